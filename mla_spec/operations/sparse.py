"""``sparse_prefill`` and ``sparse_decode``: attention of each query over the keys that a row of indices selects.

sparse_prefill: q is [s, h, c+r] and kv [s_kv, 1, c+r], whose first ``head_dim_v`` columns are the values. indices is int32
[s, 1, k], as FlashMLA's ``flash_mla_sparse_fwd`` takes them. Query i attends to the rows that indices[i] selects; there is
no other mask. -1, or an index of s_kv or more, selects nothing, anywhere in a row. An index that occurs twice is two keys.
Neither the order of a row nor what no index selects matters.

topk_length int32 [s]: the entries of row i from topk_length[i] on are not read. attn_sink [h], float32 or float64 where the
tensors are: out is multiplied by 1/(1 + exp(attn_sink - lse)); -inf changes nothing, and +inf gives out exactly 0. Returned
are out [s, h, head_dim_v] in the dtype, max_logits [s, h], the largest softmax_scale times q·k, and the LSE [s, h]. The
last two are natural, in float32 or better, and do not count the sink. They may be None where ``supports.lse`` is False. A row
that selects nothing gives what ``supports.empty_row`` declares, and max_logits -inf.

sparse_decode: the same for q [b, s, h, c+r] and kv_cache [pages, page_size, 1, c+r]. indices int32 [b, s, k] count its
slots, page · page_size + row; s_kv is pages · page_size. topk_length is int32 [b]. Returned are out [b, s, h, head_dim_v]
and the LSE [b, h, s].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.sparse import max_logits_with_bound, sparse_attention
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.operations.case import ATTENTION_REGIMES, Case
from mla_spec.operations.conventions import SCALES
from mla_spec.operations.decode import ATTENTION_OUTPUTS, declared_lse
from mla_spec.operations.lattice import HEADS, Lattice, Sizes, latent_dims
from mla_spec.operations.operation import Operation, View, Within
from mla_spec.operations.regimes import QUERIES, SCORES, Regime, values
from mla_spec.operations.sinks import drawn_sink
from mla_spec.operations.workload_line import WorkloadLine, integer
from mla_spec.reference.formats import round_to
from mla_spec.reference.sparse import selected_rows
from mla_spec.reference.typing import Array, BoolArray, IntArray
from mla_spec.subjects.extent import selected, selected_of_one
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, every_other, slice_of_wider, transposed, viewed


@dataclass(frozen=True)
class SparseInputs:
    """Arguments of ``sparse_prefill`` or ``sparse_decode``: values exactly representable in the dtype, and indices."""

    q: Array  # [s, h, c+r] or [b, s, h, c+r]
    kv: Array  # [s_kv, 1, c+r] or [pages, page_size, 1, c+r]
    indices: IntArray  # [s, 1, k] or [b, s, k]
    head_dim_v: int
    softmax_scale: float
    attn_sink: Array | None  # [h], numbers of float32 or infinite
    topk_length: IntArray | None  # [s] or [b]

    @property
    def kv_cache(self) -> Array:
        """What ``sparse_decode`` calls the rows."""
        return self.kv

    @property
    def rows(self) -> Array:
        """What indices count, [s_kv, c+r]."""
        return self.kv.reshape(-1, self.kv.shape[-1])

    @property
    def entries(self) -> IntArray:
        """The indices without the axis of key heads, [(b,) s, k]."""
        return self.indices if self.q.ndim == 4 else self.indices[:, 0]


REGIMES: tuple[Regime, ...] = (
    *values("regime", "typical", "outlier", "ties", "negative"),
    *SCORES,
    ("all entries valid", lambda case: case.invalid == 0),
    ("invalid entries", lambda case: case.invalid > 0),
    ("duplicates", lambda case: case.duplicates),
    ("rows that select nothing", lambda case: case.empty_rows),
    ("topk_length", lambda case: case.with_length),
    ("no sink", lambda case: case.sink == "none"),
    ("finite sink", lambda case: case.sink == "finite"),
    ("infinite sink", lambda case: case.sink == "infinite"),
)


@dataclass(frozen=True, kw_only=True)
class SparseCase(Case):
    """What both operations have.

    A row of indices selects keys in random order, all different, or with repetitions where ``duplicates``. Some entries select
    nothing: they are -1, or not below the number of keys. Their share is ``invalid``, and larger where a row has more entries
    than there are different keys. Half of the longer rows begin with a whole tile of them, unless ``with_length`` might cut
    off what follows. Each row selects a key, but for some where ``empty_rows``. ``sink`` is "none", "finite", or "infinite"
    with both infinities among the heads. ``logit_std`` and ``regime`` as in ``DecodeCase``.
    """

    operation: ClassVar[str]
    num_heads: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    topk: int = 1
    invalid: float = 0.0
    duplicates: bool = False
    empty_rows: bool = False
    with_length: bool = False
    sink: str = "none"
    logit_std: float = 1.0
    regime: str = "typical"

    def inputs(self, lead: tuple[int, ...], pool: tuple[int, ...], lengths: tuple[int, ...]) -> SparseInputs:
        """Inputs for queries [*lead, h, c+r], rows [*pool, 1, c+r] and lengths of shape ``lengths``."""
        rng = self.generator()
        c, d = self.kv_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim
        q, rows = (round_to(x, self.dtype) for x in self.operands(rng, lead, pool))
        scale = float(self.logit_std / np.sqrt(c / 4 + self.qk_rope_head_dim))
        if self.regime == "negative":
            scale = -scale
        indices = self._indices(rng, lead, int(np.prod(pool)))
        length = rng.integers(0 if self.empty_rows else 1, self.topk + 1, lengths).astype(np.int32)
        topk_length = length if self.with_length else None
        sink = None
        if self.sink != "none":
            kv = np.broadcast_to(rows.reshape(-1, d), (*lead[:-1], rows.size // d, d))
            sink = drawn_sink(rng, self.sink, _lse(scale * q, *selected_rows(kv, indices, topk_length)))
        return SparseInputs(
            q=q,
            kv=rows,
            indices=indices,
            head_dim_v=c,
            softmax_scale=scale,
            attn_sink=sink,
            topk_length=topk_length,
        )

    def operands(self, rng: np.random.Generator, lead: tuple[int, ...], pool: tuple[int, ...]) -> tuple[Array, Array]:
        """Queries [*lead, h, c+r] and rows [*pool, 1, c+r] before they are rounded."""
        h, c, d = self.num_heads, self.kv_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim
        spread = np.full(c, 0.5)
        if self.regime == "outlier":
            spread = np.where(rng.random(c) < 0.1, 15.0, 0.5)
        rows = rng.standard_normal((*pool, 1, d))
        rows[..., :c] = rng.choice([-1.0, 1.0], c) + spread * rows[..., :c]
        if self.regime == "ties":
            rows[1::2] = rows[: len(rows) // 2]
        return rng.standard_normal((*lead, h, d)), rows

    def _indices(self, rng: np.random.Generator, lead: tuple[int, ...], s_kv: int) -> IntArray:
        shape = *lead, self.topk
        beyond = rng.choice([-1, s_kv, s_kv + 7, 2**31 - 1], shape)
        if self.duplicates:
            chosen = rng.integers(0, s_kv, shape)
        else:
            every = np.broadcast_to(np.arange(max(s_kv, self.topk)), (*lead, max(s_kv, self.topk)))
            chosen = rng.permuted(every, axis=-1)[..., : self.topk]
        nothing = (rng.random(shape) < self.invalid) | (chosen >= s_kv)
        if self.empty_rows:
            nothing |= rng.random((*lead, 1)) < 0.2
        else:
            first = rng.integers(0, s_kv, (*lead, 1))
            chosen = np.where(chosen == first, chosen[..., :1], chosen)  # what differed still differs
            chosen[..., :1] = first
            nothing = (nothing | (chosen >= s_kv)) & (np.arange(self.topk) > 0)
        if self.invalid > 0 and self.topk > 16 and (self.empty_rows or not self.with_length):
            self._begin_with_holes(rng, chosen, nothing)
        return np.where(nothing, beyond, chosen).astype(np.int32)

    def _begin_with_holes(self, rng: np.random.Generator, chosen: IntArray, nothing: BoolArray) -> None:
        """Have half of the rows select nothing in a tile of their first 16 entries, or 64 where there are more."""
        tile = 64 if self.topk > 64 else 16
        holes = rng.random(nothing.shape[:-1]) < 0.5
        for x in (chosen, nothing):  # what the first entry selects, the last one does
            x[holes, -1], x[holes, 0] = x[holes, 0], x[holes, -1].copy()
        nothing[holes, :tile] = True


def _lse(scaled_q: Array, rows: Array, count: IntArray) -> Array:
    """[..., h, s] of queries [..., s, h, d], each over the first ``count`` of its rows [..., s, k, d]."""
    scores = np.einsum("...shd,...skd->...hsk", scaled_q, rows)
    scores = np.where(np.arange(rows.shape[-2]) < count[..., None, :, None], scores, -np.inf)
    lse: Array = np.logaddexp.reduce(scores, axis=-1)
    return lse


@dataclass(frozen=True, kw_only=True)
class SparsePrefillCase(SparseCase):
    """Queries of packed sequences, and the rows that their indices count."""

    kind = "sparse_prefill"
    known_regimes: ClassVar[tuple[str, ...]] = ATTENTION_REGIMES
    operation = "sparse_prefill"
    s_q: int = 1
    s_kv: int = 1

    def build(self) -> SparseInputs:
        """The inputs."""
        inputs = self.inputs((self.s_q,), (self.s_kv,), (self.s_q,))
        return SparseInputs(**vars(inputs) | {"indices": inputs.indices[:, None]})


@dataclass(frozen=True, kw_only=True)
class SparseDecodeCase(SparseCase):
    """Queries against a paged cache, whose slots page · page_size + row the indices count."""

    kind = "sparse_decode"
    known_regimes: ClassVar[tuple[str, ...]] = ATTENTION_REGIMES
    operation = "sparse_decode"
    batch: int = 1
    s: int = 1
    pages: int = 1
    page_size: int = 1

    def build(self) -> SparseInputs:
        """The inputs."""
        return self.inputs((self.batch, self.s), (self.pages, self.page_size), (self.batch,))


@dataclass(frozen=True)
class SparseExpected:
    """Exact values and their bounds, in the layout in which the operation returns them."""

    out: Array
    out_error: ErrorBound
    max_logits: Array
    max_logits_error: ErrorBound
    lse: Array
    lse_error: ErrorBound

    def __getitem__(self, index: IntArray | slice) -> SparseExpected:
        """Some of the leading axis."""
        return SparseExpected(*(x[index] for x in vars(self).values()))

    def outputs(self, supports: Supports) -> dict[str, Within]:
        """What each output must be, by name."""
        return {
            "out": Within(self.out, self.out_error, gate=True),
            "max_logits": Within(self.max_logits, self.max_logits_error),
            "lse": Within(declared_lse(self.lse, supports), self.lse_error),
        }


def sparse_expected(
    inputs: SparseInputs, profile: Profile, probable: bool = False, failure: float = FAILURE_PROBABILITY
) -> SparseExpected:
    """Exact attention over the selected rows, and its bound; that which honest calls exceed with ``failure`` if ``probable``."""
    kv = np.broadcast_to(inputs.rows, (*inputs.q.shape[:-3], *inputs.rows.shape))
    want = sparse_attention(
        inputs.q,
        kv,
        inputs.entries,
        head_dim_v=inputs.head_dim_v,
        softmax_scale=inputs.softmax_scale,
        profile=profile,
        attn_sink=inputs.attn_sink,
        topk_length=inputs.topk_length,
        probable=probable or profile.coarse,
        failure=failure,
    ).judged_by(profile)
    if probable:
        want = replace(want, out_error=want.out_error_probable, lse_error=want.lse_error_probable)
    largest, largest_error = max_logits_with_bound(
        inputs.q,
        kv,
        inputs.entries,
        softmax_scale=inputs.softmax_scale,
        profile=profile,
        topk_length=inputs.topk_length,
    )

    def laid_out(x: Array) -> Array:
        return x.T if inputs.q.ndim == 3 else x  # [s, h] in prefill, [b, h, s] in decode

    return SparseExpected(
        want.out,
        want.out_error,
        laid_out(largest),
        largest_error.map(laid_out),
        laid_out(want.lse),
        want.lse_error.map(laid_out),
    )


def _recorded(inputs: Any) -> SparseInputs:
    """The arguments of a recorded call, which have the rows under the name of either operation."""
    given = vars(inputs)
    kv = given.get("kv", given.get("kv_cache"))
    return SparseInputs(**{name: kv if name == "kv" else given[name] for name in SparseInputs.__dataclass_fields__})


def _decode_outputs(want: SparseExpected, supports: Supports) -> tuple[Within, ...]:
    return tuple(each for name, each in want.outputs(supports).items() if name != "max_logits")


def _others(case: Any) -> tuple[SparseInputs, ...]:
    """Other indices and lengths, and half the scale."""
    other = replace(case, seed=case.seed + 1).build()
    # LSEs are about half as large then, and sinks must leave the keys a share.
    sink = None if other.attn_sink is None else other.attn_sink / 2
    return (replace(other, softmax_scale=other.softmax_scale / 2, attn_sink=sink),)


def _views(rows: str) -> dict[str, View]:
    """Views of the arguments, of which the rows of keys are called ``rows``."""
    return {
        "q as a slice of a wider row": viewed(slice_of_wider, "q", -1, ROW_PADDING),
        "q stored with heads first": viewed(transposed, "q", 0, -2),
        "rows of keys longer than c + r": viewed(slice_of_wider, rows, -1, ROW_PADDING),
        "indices narrowed from wider rows": viewed(slice_of_wider, "indices", -1, 3),
        "attn_sink as every other element": viewed(every_other, "attn_sink"),
        "topk_length as every other element": viewed(every_other, "topk_length"),
    }


def _optional(axes: str) -> tuple[Argument, Argument]:
    """A sink, and how many indices count; ``axes`` of the latter."""
    return (
        Argument("attn_sink", "[h]", "wide", optional=True),
        Argument("topk_length", axes, "int32", optional=True),
    )


SPARSE_PREFILL = Operation(
    name="sparse_prefill",
    sizes=("num_heads", "latent_dims"),
    contract=__doc__,
    case=SparsePrefillCase,
    extent=selected_of_one,
    recorded=_recorded,
    arguments=(
        Argument("q", "[s, h, c+r]", far=True),
        Argument("kv", "[s_kv, 1, c+r]", far=True),
        Argument("indices", "[s, 1, k]", "int32"),
        *_optional("[s]"),
    ),
    keywords=("head_dim_v", "softmax_scale"),
    outputs=(
        Output("out", "[s, h, head_dim_v]", lambda inputs: (*inputs.q.shape[:2], inputs.head_dim_v)),
        Output("max_logits", "[s, h]", lambda i: i.q.shape[:2], "float32 or better", offered=lambda s: s.lse),
        Output("lse", "[s, h]", lambda i: i.q.shape[:2], "float32 or better", offered=lambda s: s.lse),
    ),
    expected=lambda inputs, profile, supports: tuple(sparse_expected(inputs, profile).outputs(supports).values()),
    probable=lambda inputs, profile, supports, failure: tuple(
        sparse_expected(inputs, profile, True, failure).outputs(supports).values()
    ),
    views=_views("kv"),
    regimes=REGIMES,
    others=_others,
    distant=lambda case: replace(case, s_q=3, s_kv=3).build(),
    conventions=SCALES,
)

SPARSE_PAGE = 64
"""Tokens of a page of a map, where a subject leaves the choice."""


def _sparse_fields(supports: Supports, name: str, sizes: Sizes) -> dict[str, Any]:
    """Two sequences, and a quarter more slots than each query selects."""
    page = (supports.page_sizes or (SPARSE_PAGE,))[0]
    return {
        "batch": 2,
        "s": sizes["queries"],
        "num_heads": sizes["heads"],
        "topk": sizes["selected"],
        "pages": -(-5 * sizes["selected"] // (4 * page)),
        "page_size": page,
        "invalid": 0.3 if name == "with holes" else 0.0,
        "with_length": name == "with topk_length",
        **latent_dims(supports),
    }


SPARSE_LATTICE = Lattice(
    law="test_sparse_decode_agrees_with_reference",
    kind="selection",
    classes=("keys alone", "with holes", "with topk_length"),
    axes={"heads": HEADS, "queries": (1, 2, 3, 4), "selected": (1, 16, 64, 128, 512, 2048)},
    fields=_sparse_fields,
    declared=lambda supports, name, sizes: (
        (supports.num_heads is None or sizes["heads"] in supports.num_heads)
        and sizes["selected"] % supports.topk_multiple == 0
        and (supports.topk_length or name != "with topk_length")
    ),
)


def _elements(case: SparseDecodeCase) -> dict[str, int]:
    width, slots, rows = case.kv_lora_rank + case.qk_rope_head_dim, case.pages * case.page_size, case.batch * case.s
    return {
        "queries": rows * case.num_heads * width,
        "pages": slots * width,
        "indices": rows * max(case.topk, slots),
    }


WORKLOAD = WorkloadLine(
    fields={
        "batch": integer(1),
        "s": integer(1, 1),
        "num_heads": integer(1),
        "kv_lora_rank": integer(1, 512),
        "qk_rope_head_dim": integer(0, 64),
        "page_size": integer(1, 64),
        "pages": integer(1, 64),
        "topk": integer(1, 2048),
    },
    case=partial(SparseDecodeCase, dtype="float32"),
    elements=_elements,
)

SPARSE_DECODE = Operation(
    name="sparse_decode",
    sizes=("num_heads", "latent_dims", "page_sizes"),
    contract=__doc__,
    case=SparseDecodeCase,
    extent=selected,
    recorded=_recorded,
    arguments=(
        Argument("q", "[b, s, h, c+r]", far=True),
        Argument("kv_cache", "[pages, page_size, 1, c+r]", far=True),
        Argument("indices", "[b, s, k]", "int32"),
        *_optional("[b]"),
    ),
    keywords=("head_dim_v", "softmax_scale"),
    outputs=ATTENTION_OUTPUTS,
    expected=lambda inputs, profile, supports: _decode_outputs(sparse_expected(inputs, profile), supports),
    probable=lambda inputs, profile, supports, failure: _decode_outputs(
        sparse_expected(inputs, profile, True, failure), supports
    ),
    views=_views("kv_cache") | {"pages further apart than a page": viewed(slice_of_wider, "kv_cache", 1, 3)},
    regimes=(*REGIMES, *QUERIES),
    others=_others,
    distant=lambda case: replace(case, batch=3, pages=3).build(),
    conventions=SCALES,
    lattice=SPARSE_LATTICE,
    workload=WORKLOAD,
)
