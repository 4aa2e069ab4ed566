"""``prefill``: attention of packed sequences, each to its own keys.

q and k are [tokens, h, n+r] and v is [tokens, h, v], the tokens of all sequences on one axis. Sequence i has the tokens
cu_seqlens[i] .. cu_seqlens[i + 1] - 1 (int32 [b + 1]), of queries and of keys. It may have more keys than queries, or
fewer, or none of either. Query i of the s of a sequence sees keys 0 .. t - s + i of its t where ``causal`` (bottom-right),
all of them otherwise. ``window`` and attn_sink [h] are those of ``decode``, where ``supports.sliding_window`` and
``supports.dense_sink`` name "prefill".

Returned are out [tokens, h, v] in the dtype and the LSE [h, tokens], the natural logarithm, in float32 or better, without the sink,
or None where ``supports.lse`` is False. A row that sees no key gives what ``supports.empty_row`` declares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.prefill import prefill_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.operations.case import ATTENTION_REGIMES, Case
from mla_spec.operations.conventions import PREFILL_CONVENTIONS
from mla_spec.operations.decode import OPTIONS, SINK_VIEWS, attention_expected, probably
from mla_spec.operations.lattice import HEADS, Lattice
from mla_spec.operations.operation import Operation, as_it_is
from mla_spec.operations.regimes import PACKED, SCORES, Regime, values
from mla_spec.operations.sinks import drawn_sink
from mla_spec.operations.workload_line import WorkloadLine, flag, integer, length_list, shown_json
from mla_spec.reference.formats import round_to
from mla_spec.reference.prefill import prefill
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Tensors
from mla_spec.subjects.extent import packed
from mla_spec.subjects.near import near
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.views import ROW_PADDING, every_other, slice_of_wider, transposed, viewed


@dataclass(frozen=True)
class PrefillInputs:
    """Arguments of ``prefill``: float64 values exactly representable in the dtype, and offsets."""

    q: Array  # [tokens, h, n+r]
    k: Array  # [key tokens, h, n+r]
    v: Array  # [key tokens, h, v]
    cu_seqlens_q: IntArray  # [b + 1]
    cu_seqlens_k: IntArray  # [b + 1]
    softmax_scale: float
    causal: bool
    attn_sink: Array | None = None  # [h], numbers of float32 or infinite
    window: int | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """The arguments without the options."""
        return {name: value for name, value in vars(self).items() if name not in OPTIONS}


REGIMES: tuple[Regime, ...] = (*values("regime", "typical", "outlier", "ties", "negative"), *SCORES, *PACKED)


@dataclass(frozen=True, kw_only=True)
class PrefillCase(Case):
    """Packed sequences with their own numbers of queries and keys.

    ``logit_std`` is the standard deviation of the logits, reached through softmax_scale. ``regime``: "typical"; "outlier" has
    value channels 30 times the rest; "ties" repeats keys; in "negative" softmax_scale is.
    Values have a mean, so that outputs do not average out to 0. ``sink`` and ``window`` as in ``DecodeCase``.
    """

    kind = "prefill"
    known_regimes: ClassVar[tuple[str, ...]] = ATTENTION_REGIMES
    optional = ("sink", "window")
    seqlens_q: tuple[int, ...] = (1,)
    seqlens_k: tuple[int, ...] = (1,)
    num_heads: int = 1
    qk_head_dim: int = 2
    v_head_dim: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"
    sink: str = "none"
    window: int = 0

    def build(self) -> PrefillInputs:
        """The inputs."""
        rng = self.generator()
        offsets_q, offsets_k = (np.cumsum([0, *n]).astype(np.int32) for n in (self.seqlens_q, self.seqlens_k))
        h, d = self.num_heads, self.qk_head_dim
        q = rng.standard_normal((offsets_q[-1], h, d))
        k = rng.standard_normal((offsets_k[-1], h, d))
        spread = np.full(self.v_head_dim, 0.5)
        if self.regime == "outlier":
            spread = np.where(rng.random(self.v_head_dim) < 0.1, 15.0, 0.5)
        v = rng.choice([-1.0, 1.0], self.v_head_dim) + spread * rng.standard_normal((len(k), h, self.v_head_dim))
        if self.regime == "ties":
            k[1::2] = k[: len(k) // 2]
        scale = float(self.logit_std / np.sqrt(d))
        inputs = PrefillInputs(
            q=round_to(q, self.dtype),
            k=round_to(k, self.dtype),
            v=round_to(v, self.dtype),
            cu_seqlens_q=offsets_q,
            cu_seqlens_k=offsets_k,
            softmax_scale=-scale if self.regime == "negative" else scale,
            causal=self.causal,
            window=self.window or None,
        )
        if self.sink == "none":
            return inputs
        _, lse = prefill(**vars(inputs))
        return replace(inputs, attn_sink=drawn_sink(np.random.default_rng([self.seed, 2]), self.sink, lse))


def prefill_expected(inputs: PrefillInputs, profile: Profile) -> BoundedAttention:
    """Exact prefill and its bound."""
    return prefill_with_bound(**vars(inputs), profile=profile, probable=profile.coarse).judged_by(profile)


def _others(case: PrefillCase) -> tuple[PrefillInputs, ...]:
    """The lengths of the same sequences in another order, and other numbers at half the scale."""
    mirrored = replace(case, seed=case.seed + 1, seqlens_q=case.seqlens_q[::-1], seqlens_k=case.seqlens_k[::-1])
    other = replace(case, seed=case.seed + 2).build()
    sink = None if other.attn_sink is None else other.attn_sink / 2  # LSEs are about half as large then
    return mirrored.build(), replace(other, softmax_scale=other.softmax_scale / 2, attn_sink=sink)


@near
def _keys_and_values_together(t: Tensors) -> Tensors:
    """k and v as slices of one row per head, as kv_b_proj returns them."""
    both = torch.cat([t["k"], t["v"]], dim=-1)
    d = t["k"].shape[-1]
    return t | {"k": both[..., :d], "v": both[..., d:]}


PACKED_LSE = Output(
    "lse",
    "[h, tokens] or None",
    lambda inputs: (inputs.q.shape[1], len(inputs.q)),
    "float32 or better",
    offered=lambda supports: supports.lse,
)

_BESIDE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one sequence": ((), ()),
    "a short one before it": ((3,), (5,)),
    "one without queries before it": ((0,), (4,)),
}
"""Queries and keys of the sequences before the one whose sizes are mapped."""

LATTICE = Lattice(
    law="test_prefill_agrees_with_reference",
    kind="batch",
    classes=tuple(_BESIDE),
    axes={"heads": HEADS, "queries": (1, 2, 3, 16, 64, 65, 130), "cached": (0, 1, 16, 63, 64, 256)},
    fields=lambda supports, name, sizes: {
        "seqlens_q": _BESIDE[name][0] + (sizes["queries"],),
        "seqlens_k": _BESIDE[name][1] + (sizes["queries"] + sizes["cached"],),
        "num_heads": sizes["heads"],
        "causal": True in supports.causal,
        **dict(zip(("qk_head_dim", "v_head_dim"), (supports.prefill_dims or ((192, 128),))[0], strict=True)),
    },
    declared=lambda supports, _, sizes: supports.num_heads is None or sizes["heads"] in supports.num_heads,
)


def _of_line(seqlens_k: tuple[int, ...] | None, **values: Any) -> PrefillCase:
    queries = values["seqlens_q"]
    keys = queries if seqlens_k is None else seqlens_k
    if len(keys) != len(queries):
        raise ValueError(
            f"seqlens_k is {shown_json(list(keys))}; expected as many lengths as seqlens_q has, {len(queries)}"
        )
    return PrefillCase(dtype="float32", seqlens_k=keys, **values)


def _elements(case: PrefillCase) -> dict[str, int]:
    row = case.num_heads * case.qk_head_dim
    return {"queries": sum(case.seqlens_q) * row, "keys": sum(case.seqlens_k) * row}


WORKLOAD = WorkloadLine(
    fields={
        "seqlens_q": length_list(),
        "seqlens_k": length_list(None),
        "num_heads": integer(1),
        "qk_head_dim": integer(1, 192),
        "v_head_dim": integer(1, 128),
        "causal": flag(True),
    },
    case=_of_line,
    elements=_elements,
)

OPERATION = Operation(
    name="prefill",
    sizes=("num_heads", "prefill_dims"),
    contract=__doc__,
    case=PrefillCase,
    extent=packed,
    recorded=as_it_is,
    arguments=(
        Argument("q", "[tokens, h, n+r]", far=True),
        Argument("k", "[key tokens, h, n+r]", far=True),
        Argument("v", "[key tokens, h, v]", far=True),
        Argument("cu_seqlens_q", "[b+1]", "int32"),
        Argument("cu_seqlens_k", "[b+1]", "int32"),
        Argument("attn_sink", "[h]", "wide", optional=True),
    ),
    keywords=("softmax_scale", "causal"),
    options=("window",),
    outputs=(
        Output("out", "[tokens, h, v]", lambda inputs: (*inputs.q.shape[:2], inputs.v.shape[-1])),
        PACKED_LSE,
    ),
    expected=lambda inputs, profile, supports: attention_expected(prefill_expected(inputs, profile), supports),
    probable=lambda inputs, profile, supports, failure: probably(
        prefill_with_bound(
            **vars(inputs), profile=profile, probable=True, failure=failure / max(1, len(inputs.cu_seqlens_q) - 1)
        ),
        supports,
    ),
    views={
        "q as a slice of a wider row": viewed(slice_of_wider, "q", -1, ROW_PADDING),
        "q stored with heads before tokens": viewed(transposed, "q", 0, 1),
        "k and v as slices of one row": _keys_and_values_together,
        "v padded to wider rows": viewed(slice_of_wider, "v", -1, ROW_PADDING),
        "k and v stored with heads before tokens": lambda t: viewed(transposed, "k", 0, 1)(
            viewed(transposed, "v", 0, 1)(t)
        ),
        "cu_seqlens as every other element": lambda t: viewed(every_other, "cu_seqlens_q")(
            viewed(every_other, "cu_seqlens_k")(t)
        ),
        **SINK_VIEWS,
    },
    regimes=REGIMES,
    others=_others,
    distant=lambda case: replace(case, seqlens_q=(3,), seqlens_k=(3,)).build(),
    conventions=PREFILL_CONVENTIONS,
    lattice=LATTICE,
    workload=WORKLOAD,
)
