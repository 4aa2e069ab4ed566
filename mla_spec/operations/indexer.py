"""``indexer``: the lightning indexer of DeepSeek-V3.2, which says to which keys a query attends.

q is [tokens, h, d], k [key tokens, d], and weights [tokens, h] are float32 (float64 for float64 tensors). Every scale factor
is already in the weights, and rotary embedding already applied. Packed sequences are those of ``prefill``, and always
causal. logits are Σ_h weights · relu(q·k), in float32 or better; where a query does not see a key they may hold anything.
They are None where ``supports.indexer_logits`` is False.

indices, int32 or int64, count key tokens over all sequences, as ``sparse_prefill`` takes them. Row i names the top_k keys
with the largest logits that query i sees, in any order; -1 fills the row from there on where it sees fewer. Of equal logits
the smaller index is selected, unless ``supports.indexer_ties`` says "any".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.sparse import indexer_with_bound, selection_shortfall
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Answers, Judge, Operation, Within
from mla_spec.operations.regimes import PACKED, SCORES, Regime, values
from mla_spec.operations.sparse import SparseInputs, SparsePrefillCase
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array, BoolArray, IntArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.extent import packed
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, every_other, slice_of_wider, transposed, viewed


@dataclass(frozen=True)
class IndexerInputs:
    """Arguments of ``indexer``."""

    q: Array  # [tokens, h, d]
    k: Array  # [key tokens, d]
    weights: Array  # [tokens, h], numbers of float32
    cu_seqlens_q: IntArray  # [b + 1]
    cu_seqlens_k: IntArray  # [b + 1]
    top_k: int

    @property
    def first_key(self) -> IntArray:
        """The first key of each query's sequence, [tokens]."""
        return np.repeat(self.cu_seqlens_k[:-1], np.diff(self.cu_seqlens_q))

    @property
    def end_key(self) -> IntArray:
        """The end of the keys that each query sees, [tokens]; not above ``first_key`` where it sees none."""
        lengths = np.diff(self.cu_seqlens_q)
        last = np.repeat(self.cu_seqlens_q[1:], lengths) - np.arange(len(self.q)) - 1  # queries after it
        return np.maximum(np.repeat(self.cu_seqlens_k[1:], lengths) - last, self.first_key)


REGIMES: tuple[Regime, ...] = (*values("regime", "typical", "ties", "integers", "negative"), *PACKED)


@dataclass(frozen=True, kw_only=True)
class IndexerCase(Case):
    """Packed sequences with their own numbers of queries and keys.

    ``regime``: "typical"; "negative" has weights below 0, and so no logit above; "ties" repeats keys; "integers" has all
    numbers in -1 .. 1, so that logits are exact in every format and many are equal.
    """

    kind = "indexer"
    known_regimes = ("typical", "integers", "ties", "negative")
    seqlens_q: tuple[int, ...] = (1,)
    seqlens_k: tuple[int, ...] = (1,)
    num_heads: int = 1
    head_dim: int = 1
    top_k: int = 1
    regime: str = "typical"

    def build(self) -> IndexerInputs:
        """The inputs."""
        rng = self.generator()
        offsets_q, offsets_k = (np.cumsum([0, *n]).astype(np.int32) for n in (self.seqlens_q, self.seqlens_k))
        tokens, h, d = offsets_q[-1], self.num_heads, self.head_dim
        shapes: list[tuple[int, ...]] = [(tokens, h, d), (offsets_k[-1], d), (tokens, h)]
        if self.regime == "integers":
            q, k, weights = (rng.integers(-1, 2, shape).astype(float) for shape in shapes)
        else:
            # a common direction, so that logits do not average out to 0
            mean = rng.choice([-1.0, 1.0], self.head_dim)
            q, k, weights = (rng.standard_normal(shape) for shape in shapes)
            q, k, weights = q + mean, k + mean, 0.5 + weights / 2
        if self.regime == "negative":
            weights = -np.abs(weights)
        if self.regime == "ties":
            k[1::2] = k[: len(k) // 2]
        return IndexerInputs(
            q=round_to(q, self.dtype),
            k=round_to(k, self.dtype),
            weights=round_to(weights, "float32"),
            cu_seqlens_q=offsets_q,
            cu_seqlens_k=offsets_k,
            top_k=self.top_k,
        )


@dataclass(frozen=True, kw_only=True)
class IndexedAttentionCase(IndexerCase):
    """Packed sequences whose indexer selects the keys of their sparse attention.

    ``num_heads`` and ``head_dim`` are the indexer's; row i of kv belongs to its key i.
    """

    kind = "indexed_attention"
    attention_heads: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    logit_std: float = 1.0

    def attention_inputs(self, indices: IntArray) -> SparseInputs:
        """Arguments of ``sparse_prefill`` but for what ``indices`` [tokens, top_k] select."""
        prefill = SparsePrefillCase(
            dtype=self.dtype,
            seed=self.seed,
            s_q=sum(self.seqlens_q),
            s_kv=sum(self.seqlens_k),
            num_heads=self.attention_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            logit_std=self.logit_std,
        )
        return SparseInputs(**vars(prefill.build()) | {"indices": indices[:, None].astype(np.int32)})


def visible_keys(inputs: IndexerInputs) -> BoolArray:
    """Which keys each query sees, [tokens, key tokens]."""
    key = np.arange(len(inputs.k))
    return (key >= inputs.first_key[:, None]) & (key < inputs.end_key[:, None])


@dataclass(frozen=True)
class Selection:
    """Keys that may be the top_k largest of each query, given how far computed logits may be from the exact ones."""

    inputs: IndexerInputs
    logits: Array  # [tokens, key tokens]
    error: Array  # likewise

    def judge(self, judge: Judge, got: Result) -> None:
        """Each row names, once, keys that may be the largest."""
        self.named(judge, got)

    def named(self, judge: Judge, got: Result) -> BoolArray:
        """Which keys the rows name, [tokens, key tokens]; Violation unless they may be the largest."""
        inputs, visible = self.inputs, visible_keys(self.inputs)
        count = np.minimum(visible.sum(axis=-1), inputs.top_k)
        named = np.zeros_like(visible)
        for i, row in enumerate(got.bits):
            chosen = row[: count[i]]
            at = f"indices[{i}] = {row.tolist()}, of a query that sees keys {inputs.first_key[i]} .. {inputs.end_key[i] - 1}"
            judge.require(bool((row[count[i] :] == -1).all()), f"{at}: must be -1 from entry {count[i]} on")
            inside = (chosen >= inputs.first_key[i]) & (chosen < inputs.end_key[i])
            judge.require(bool(inside.all()), f"{at}: entry {chosen[~inside].tolist()} is no key that it sees")
            judge.require(len(np.unique(chosen)) == len(chosen), f"{at}: a key is named twice")
            named[i, chosen] = True
        judge.bounded(np.where(visible, self.logits, -np.inf), self.error)
        shortfall = selection_shortfall(self.logits, self.error, named, visible)
        worst = int(np.argmax(shortfall))
        judge.require(
            bool(shortfall[worst] <= 0),
            f"indices[{worst}] leaves out a larger logit than one that it names, by {shortfall[worst]:.3g} more than the "
            f"errors of both explain",
        )
        return named


def indexer_expected(inputs: IndexerInputs, logits: Array, bound: ErrorBound) -> tuple[Within, Selection]:
    """Exact logits with their bound where they are visible, and what may be selected by them."""
    return Within(logits, bound, read=visible_keys(inputs)), Selection(inputs, logits, bound.total)


def expected(inputs: IndexerInputs, profile: Profile, supports: Supports) -> Answers:
    """Logits of all pairs of queries and keys, and the selection."""
    return indexer_expected(inputs, *indexer_with_bound(inputs.q, inputs.k, inputs.weights, profile))


def _others(case: IndexerCase) -> tuple[IndexerInputs, ...]:
    """The lengths of the same sequences in another order."""
    mirrored = replace(case, seed=case.seed + 1, seqlens_q=case.seqlens_q[::-1], seqlens_k=case.seqlens_k[::-1])
    return (mirrored.build(),)


OPERATION = Operation(
    name="indexer",
    sizes=("indexer_dims", "indexer_top_k"),
    contract=__doc__,
    case=IndexerCase,
    extent=packed,
    arguments=(
        Argument("q", "[tokens, h, d]", far=True),
        Argument("k", "[key tokens, d]", far=True),
        Argument("weights", "[tokens, h]", "wide", far=True),
        Argument("cu_seqlens_q", "[b+1]", "int32"),
        Argument("cu_seqlens_k", "[b+1]", "int32"),
    ),
    keywords=("top_k",),
    outputs=(
        Output(
            "logits",
            "[tokens, key tokens] or None",
            lambda inputs: (len(inputs.q), len(inputs.k)),
            "float32 or better",
            offered=lambda supports: supports.indexer_logits,
        ),
        Output("indices", "[tokens, top_k]", lambda inputs: (len(inputs.q), inputs.top_k), "indices"),
    ),
    expected=expected,
    views={
        "q as a slice of a wider row": viewed(slice_of_wider, "q", -1, ROW_PADDING),
        "q stored with heads before tokens": viewed(transposed, "q", 0, 1),
        "k as a slice of a wider row": viewed(slice_of_wider, "k", -1, ROW_PADDING),
        "weights stored with heads before tokens": viewed(transposed, "weights", 0, 1),
        "cu_seqlens as every other element": lambda t: viewed(every_other, "cu_seqlens_q")(
            viewed(every_other, "cu_seqlens_k")(t)
        ),
    },
    regimes=REGIMES,
    others=_others,
    distant=lambda case: replace(case, seqlens_q=(3,), seqlens_k=(3,)).build(),
)


INDEXED_REGIMES: tuple[Regime, ...] = (*REGIMES, *SCORES)
