"""Cases of ``sparse_prefill``, ``sparse_decode`` and ``indexer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mla_spec.operations.case import Case
from mla_spec.reference.formats import round_to
from mla_spec.reference.sparse import selected_rows
from mla_spec.reference.typing import Array, BoolArray, IntArray


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
    def rows(self) -> Array:
        """What indices count, [s_kv, c+r]."""
        return self.kv.reshape(-1, self.kv.shape[-1])

    @property
    def entries(self) -> IntArray:
        """The indices without the axis of key heads, [(b,) s, k]."""
        return self.indices if self.q.ndim == 4 else self.indices[:, 0]


@dataclass(frozen=True, kw_only=True)
class SparseCase(Case):
    """What both operations have.

    A row of indices selects keys in random order: all different, or with repetitions where ``duplicates``. The share
    ``invalid`` of its entries selects nothing: -1, or not below the number of keys, as whatever exceeds that number does
    where all must differ; where there are such entries, half of the longer rows begin with a tile of them, unless
    ``with_length`` might cut off what follows. ``empty_rows`` makes some rows select nothing, else each selects a key.
    ``sink``: "none", "finite", or "infinite" with both infinities among the heads. ``logit_std`` and ``regime`` as in ``DecodeCase``.
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
        indices = self._indices(rng, lead, int(np.prod(pool)))
        length = rng.integers(0 if self.empty_rows else 1, self.topk + 1, lengths).astype(np.int32)
        topk_length = length if self.with_length else None
        sink = None
        if self.sink != "none":
            kv = np.broadcast_to(rows.reshape(-1, d), (*lead[:-1], rows.size // d, d))
            sink = self._sink(rng, _least_lse(scale * q, *selected_rows(kv, indices, topk_length)))
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

    def _sink(self, rng: np.random.Generator, least_lse: Array) -> Array:
        """Sinks near ``least_lse`` [h], so that they leave the keys a share that formats of 16 bits can hold."""
        sink = round_to(least_lse + rng.uniform(-3, 3, self.num_heads), "float32")
        if self.sink == "infinite":
            sink = np.where(rng.random(self.num_heads) < 0.7, rng.choice([-np.inf, np.inf], self.num_heads), sink)
        return sink


def _least_lse(scaled_q: Array, rows: Array, count: IntArray) -> Array:
    """The least LSE of each head over the queries [..., s, h, d] that select one of their rows [..., s, k, d]; else 0."""
    scores = np.einsum("...shd,...skd->...hsk", scaled_q, rows)
    scores = np.where(np.arange(rows.shape[-2]) < count[..., None, :, None], scores, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=-1)  # [..., h, s]
    heads = np.moveaxis(lse, -2, 0).reshape(lse.shape[-2], -1)
    least = np.where(np.isneginf(heads), np.inf, heads).min(axis=-1)
    return np.where(np.isinf(least), 0.0, least)


@dataclass(frozen=True, kw_only=True)
class SparsePrefillCase(SparseCase):
    """Queries of packed sequences, and the rows that their indices count."""

    kind = "sparse_prefill"
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
    operation = "sparse_decode"
    batch: int = 1
    s: int = 1
    pages: int = 1
    page_size: int = 1

    def build(self) -> SparseInputs:
        """The inputs."""
        return self.inputs((self.batch, self.s), (self.pages, self.page_size), (self.batch,))


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


@dataclass(frozen=True, kw_only=True)
class IndexerCase(Case):
    """Packed sequences with their own numbers of queries and keys.

    ``regime``: "typical"; "ties" repeats keys; "integers" has all numbers in -1 .. 1, so that logits are exact in every
    format and many are equal.
    """

    kind = "indexer"
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
