"""Laws of weight absorption."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from mla_spec.judging.law import Run, law
from mla_spec.operations.all import DecodeCase
from mla_spec.properties.expected import decode_expected
from mla_spec.properties.memory import require_unmodified
from mla_spec.properties.strategies.sizes import decode_cases, narrowed
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.mla import absorb, explicit
from mla_spec.subjects.driver import computed


@law(needs=("absorb",), cases=decode_cases)
def test_absorb_splits_kv_b_proj(run: Run, case: DecodeCase) -> None:
    """w_uk and w_uv are the key and the value rows of each head, bit for bit."""
    kv_b_proj, config, _ = case.latent_weights()
    got = run.driver.absorb(kv_b_proj, config)
    for result, want in zip(got, absorb(kv_b_proj, config), strict=True):
        different = result.value != want
        run.require(
            not different.any(),
            f"{result.what}: {int(different.sum())} of {want.size} elements are not the rows of kv_b_proj; "
            f"first at {list(np.argwhere(different)[0]) if different.any() else ''}",
        )


@law(needs=("absorb",), cases=decode_cases)
def test_absorb_calls_are_independent(run: Run, case: DecodeCase) -> None:
    """A second weight of the same shape is split itself, as with an adapter merged; nothing of the first lives on."""
    for this in (case, replace(case, seed=case.seed + 1), case):
        kv_b_proj, config, _ = this.latent_weights()
        for result, want in zip(run.driver.absorb(kv_b_proj, config), absorb(kv_b_proj, config), strict=True):
            different = int((result.value != want).sum())
            run.require(different == 0, f"{result.what}: {different} of {want.size} elements are not this weight's")


@law(needs=("absorb",), cases=decode_cases)
def test_absorb_does_not_modify_its_input(run: Run, case: DecodeCase) -> None:
    """kv_b_proj has not changed when absorb returns."""
    kv_b_proj, config, _ = case.latent_weights()
    weight = run.driver.tensor(kv_b_proj)
    call = partial(run.driver.subject.absorb, weight, config=config)
    require_unmodified(run, "absorb", {"kv_b_proj": weight}, lambda: run.driver.guard(call))


@law(needs=("absorb", "decode"), cases=narrowed(decode_cases, logit_stds=(1.0, 4.0, 0.1)))
def test_absorbed_equals_explicit(run: Run, case: DecodeCase) -> None:
    """Folding w_uk into q, decoding over the latent and unfolding w_uv gives multi-head attention over expanded K and V."""
    inputs = case.build()
    kv_b_proj, config, q_nope = case.latent_weights()
    w_uk, w_uv = (result.value for result in run.driver.absorb(kv_b_proj, config))
    q_pe = inputs.q[..., case.kv_lora_rank :]
    folded = np.einsum("bshn,hnc->bshc", q_nope, w_uk)  # [b, s, h, c]
    stored = np.concatenate([round_to(folded, case.dtype), q_pe], axis=-1)
    exact_q = np.concatenate([folded, q_pe], axis=-1)
    out = run.driver.decode(replace(inputs, q=stored))[0].value  # [b, s, h, c]
    got = np.einsum("bshc,hvc->bshv", out, w_uv)

    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    want, _ = explicit(
        q_nope,
        q_pe,
        rows[..., : case.kv_lora_rank],
        rows[..., case.kv_lora_rank :],
        *absorb(kv_b_proj, config),
        softmax_scale=inputs.softmax_scale,
        cache_seqlens=inputs.cache_seqlens,
        causal=inputs.causal,
    )
    fmt = format_of(case.dtype)
    lost = fmt.unit_roundoff * np.abs(exact_q) + fmt.smallest_subnormal
    lost[..., case.kv_lora_rank :] = 0.0
    bounded = decode_expected(replace(inputs, q=exact_q), run.profile, inherited_q=lost)
    bound = bounded.out_error.map(lambda term: np.einsum("bshc,hvc->bshv", term, np.abs(w_uv)))
    gauge = np.einsum("bshc,hvc->bshv", np.abs(bounded.out) + bounded.out_error.total, np.abs(w_uv))
    sums = 4 * (case.kv_lora_rank + case.qk_nope_head_dim) * format_of("float64").unit_roundoff * gauge
    run.within(computed(got, "out · w_uvᵀ"), want, bound.plus("float64 products of the law", sums), gate=False)
