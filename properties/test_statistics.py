"""Laws of ``decode`` that no single output can break: errors that are small everywhere, but lean one way or are too large.

A case is one test on hundreds of rows. The cases are few and fixed, whatever the seed and the number of examples, since the
probability of a false alarm is split over them. `docs/statistics.md` derives the hypotheses.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.bias import ErrorModel
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.statistics import FAMILY_ALPHA, bias_p_value, excess_p_value, require_allowance
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.properties.strategies.sizes import judgeable_stds
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.supports import DTYPES, Supports

LAWS = ("test_decode_output_is_unbiased", "test_decode_lse_is_unbiased", "test_decode_error_is_as_small_as_declared")
"""Every law of this module."""


@dataclass(frozen=True)
class Design:
    """A case, the same for every dtype but for what the subject supports.

    Attributes:
        seed: of the values.
        rows: pairs of a sequence and a head, at least.
        heads: of each sequence, where the subject leaves the choice.
        keys: of the longest sequence, where it stays within ``ELEMENTS``.
        logit_std: of the scores.
    """

    seed: int
    rows: int
    heads: int
    keys: int
    logit_std: float


DESIGNS = (
    Design(seed=0, rows=512, heads=8, keys=300, logit_std=2.0),
    Design(seed=1, rows=128, heads=32, keys=4096, logit_std=0.5),
)
"""The cases of each law: scores that show a wrong scale in many sequences, and long sequences of which no key is lost."""

ELEMENTS = 2_400_000
"""Of the cached rows of a case, about; more takes longer than it tells."""

ALPHA = FAMILY_ALPHA / (len(LAWS) * len(DESIGNS) * len(DTYPES))
"""Level of one case of one law."""


def statistics_case(design: Design, supports: Supports, dtype: str) -> DecodeCase:
    """The case of a design, narrow and with small pages where the subject leaves the choice; lengths vary by an eighth."""
    c, r = min(supports.latent_dims or ((32, 4),), key=sum)
    heads = min(supports.num_heads or (design.heads,), key=lambda h: abs(h - design.heads))
    batch = -(-design.rows // heads)
    keys = max(64, min(design.keys, ELEMENTS // (batch * (c + r))))
    return DecodeCase(
        dtype=dtype,
        seed=design.seed,
        seqlens=tuple(keys - 7 * i % (keys // 8) for i in range(batch)),
        num_heads=heads,
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=min(supports.page_sizes or (16,), key=lambda size: abs(size - 16)),
        causal=supports.causal[0],
        logit_std=design.logit_std,
    )


def statistics_cases(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """The case of each design."""
    cases = [statistics_case(design, supports, profile.dtype) for design in DESIGNS]
    if profile.query is None and profile.score.operands is None:
        return cases
    # A rounded query moves all scores of a row alike, which counts as a bias: flatter scores leave it finite.
    stds = [judgeable_stds((c.logit_std, 0.1), profile, c.kv_lora_rank + c.qk_rope_head_dim, c.regime) for c in cases]
    return [replace(case, logit_std=max(some)) for case, some in zip(cases, stds, strict=True)]


def _needs_lse(supports: Supports) -> str:
    return "" if supports.lse else "decode returns no LSE"


def _judge(run: Run, p_value: float, message: str) -> None:
    """Fail below ``ALPHA``; the evidence as a share of what fails is the law's error / bound."""
    evidence = abs(math.log(max(p_value, sys.float_info.min)) / math.log(ALPHA))
    if run.worst is None or evidence > run.worst:
        run.worst, run.worst_case = evidence, run.case_id if evidence else ""
    run.require(
        p_value >= ALPHA,
        f"{message}\n"
        f"a subject that is what it declares shows this with probability {p_value:.1e} at most; less than {ALPHA:.1e} fails",
    )


@dataclass(frozen=True)
class Estimates:
    """A quantity as each row shows it, which is 0 but for rounding.

    Attributes:
        what: the quantity.
        value: of independent rows.
        allowance: how far a bias that the profile lets exist may move each.
    """

    what: str
    value: Array
    allowance: Array

    @property
    def p_value(self) -> float:
        return bias_p_value(self.value, self.allowance)


def _estimates(model: ErrorModel, inputs: DecodeInputs, error: Array) -> Iterator[Estimates]:
    """What a fault of the sums may move, as the error [b, h, c] of an output shows it."""

    def along(what: str, direction: Array) -> Estimates:
        return Estimates(what, (error * direction).sum(-1), model.bias(direction))

    yield from _by_head(along("gain of the output", model.out / np.mean((model.out**2).sum(-1))))
    # ∂o/∂log(scale) = Cov_p(s, v)
    scores = np.where(model.p > 0, model.scores, 0.0)
    by_scale = (model.p * (scores - (model.p * scores).sum(-1, keepdims=True))) @ model.v
    yield along("softmax_scale", by_scale / np.mean((by_scale**2).sum(-1)))
    for what, token in _boundary_keys(inputs).items():
        page_size = inputs.kv_cache.shape[1]
        page = inputs.block_table[np.arange(len(token)), token // page_size]
        value = inputs.kv_cache[page, token % page_size, 0, : inputs.head_dim_v]  # [b, c]
        towards = value[:, None] - model.out
        yield along(f"weight of {what}", towards / (towards**2).sum(-1, keepdims=True))


def _by_head(every: Estimates) -> Iterator[Estimates]:
    """A quantity over all rows [b, h], and over those of each head."""
    yield every
    for head in range(every.value.shape[1]):
        yield Estimates(f"{every.what} of head {head}", every.value[:, head], every.allowance[:, head])


def _boundary_keys(inputs: DecodeInputs) -> dict[str, IntArray]:
    """Tokens that a wrong loop over the keys drops or adds, one of each sequence."""
    page_size, length = inputs.kv_cache.shape[1], inputs.cache_seqlens
    return {
        "the first key": 0 * length,
        "the last key of the first page": np.minimum(page_size, length) - 1,
        "the first key of the second page": np.minimum(page_size, length - 1),
        "the last key": length - 1,
        "the slot after the last key": length,
    }


def model_of(inputs: DecodeInputs, profile: Profile) -> ErrorModel:
    """The errors of decode under a profile."""
    arguments = {name: value for name, value in vars(inputs).items() if name != "causal"}  # one query sees all keys
    return ErrorModel.of(**arguments, profile=profile)


@law(needs=DECODE, cases=statistics_cases)
def test_decode_output_is_unbiased(run: Run, case: DecodeCase) -> None:
    """The gain, softmax_scale and the weights of boundary keys, as all outputs together show them, are right."""
    inputs = case.build()
    model = model_of(inputs, run.profile)
    _judge_bias(run, list(_estimates(model, inputs, model.error(run.call(DECODE, inputs)[0].value))))


@law(needs=DECODE, cases=statistics_cases, missing=_needs_lse)
def test_decode_lse_is_unbiased(run: Run, case: DecodeCase) -> None:
    """The errors of all LSEs, and of those of each head, do not lean up or down."""
    inputs = case.build()
    model = model_of(inputs, run.profile)
    lse = run.call(DECODE, inputs)[1]
    assert lse is not None
    _judge_bias(run, list(_by_head(Estimates("LSE", model.lse_error(lse.value), model.lse_bias))))


def _judge_bias(run: Run, estimates: list[Estimates]) -> None:
    """Judge the least probable of several quantities, at its share of the level."""
    worst = min(estimates, key=lambda e: e.p_value)
    _judge(
        run,
        min(1.0, len(estimates) * worst.p_value),
        f"{worst.what} is off by {worst.value.mean():+.2e} on average over {worst.value.size} rows; "
        f"a bias of {worst.allowance.mean():.1e} is declared",
    )


@law(needs=DECODE, cases=statistics_cases)
def test_decode_error_is_as_small_as_declared(run: Run, case: DecodeCase) -> None:
    """The mean square error is no larger than what the declared roundings of P and of the output amount to."""
    inputs = case.build()
    model = model_of(inputs, run.profile)
    error = model.error(run.call(DECODE, inputs)[0].value)
    require_allowance(model.mean_square)
    ratios = (error**2).sum(-1) / model.mean_square  # [b, h]
    deviation = np.sqrt(model.mean_square / error.shape[-1])[..., None]  # [b, h, 1], of one element at most
    run.counts("predicted", np.abs(error) / deviation)
    _judge(
        run,
        excess_p_value(ratios),
        f"the mean square error is {ratios.mean():.2f} times the largest that is declared, over {ratios.size} rows",
    )
