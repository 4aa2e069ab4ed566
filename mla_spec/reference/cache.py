"""The paged latent cache: addressing, contents, and exact sizes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mla_spec.reference.attention import attention
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array, IntArray


def slot_mapping(block_table: IntArray, tokens: IntArray, page_size: int) -> IntArray:
    """Where token i of a sequence is stored: page block_table[i // page_size], row i % page_size, as one number.

    Args:
        block_table: [..., max pages], pages of each sequence in order.
        tokens: [..., n], indices of tokens in their sequences.

    Returns:
        [..., n] slots, page · page_size + row.
    """
    pages = np.take_along_axis(block_table, tokens // page_size, axis=-1)
    return pages.astype(np.int64) * page_size + tokens % page_size


def write_rows(kv_cache: Array, latent: Array, k_pe: Array, slots: IntArray) -> Array:
    """The cache with rows [latent | k_pe] stored in ``slots``; slot -1 stores nothing.

    Args:
        kv_cache: [pages, page_size, 1, c+r].
        latent, k_pe: [n, c] and [n, r].
        slots: [n], none named twice: which row a slot would hold is not defined.

    Raises:
        ValueError: a slot lies outside the cache or is named twice.
    """
    pages, page_size, _, width = kv_cache.shape
    if slots.size and (slots.min() < -1 or slots.max() >= pages * page_size):
        raise ValueError(f"slots must lie in -1 .. {pages * page_size - 1}, got {slots.min()} .. {slots.max()}")
    rows = kv_cache.reshape(pages * page_size, width).copy()
    kept = slots >= 0
    if len(np.unique(slots[kept])) < kept.sum():
        raise ValueError("slots must be named once, -1 aside")
    rows[slots[kept]] = np.concatenate([latent, k_pe], axis=-1)[kept]
    return rows.reshape(kv_cache.shape)


def gather_rows(kv_cache: Array, block_table: IntArray, cache_seqlens: IntArray) -> Array:
    """Rows of each sequence in token order, padded with 0 to the longest; [b, t, c+r].

    Nothing beyond a sequence's length is read, neither slots nor table entries.

    Raises:
        ValueError: a sequence is longer than its row of the table.
    """
    page_size, longest = kv_cache.shape[1], int(cache_seqlens.max(initial=0))
    if longest > block_table.shape[1] * page_size:
        raise ValueError(f"{block_table.shape[1]} pages of {page_size} tokens do not hold a sequence of {longest}")
    token = np.arange(longest)
    used = token < cache_seqlens[:, None]  # [b, t]
    pages = np.where(used, block_table[:, token // page_size], 0)
    return np.where(used[..., None], kv_cache[pages, token % page_size, 0], 0.0)


def paged_decode(
    q: Array,
    kv_cache: Array,
    block_table: IntArray,
    cache_seqlens: IntArray,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    attn_sink: Array | None = None,
) -> tuple[Array, Array]:
    """``attention`` of q [b, s, h, c+r] to the cached rows, whose first ``head_dim_v`` elements are the values.

    Returns:
        (out [b, s, h, head_dim_v], lse [b, h, s]).
    """
    rows = gather_rows(kv_cache, block_table, cache_seqlens)[:, :, None]  # [b, t, 1, c+r]
    return attention(
        q,
        rows,
        rows[..., :head_dim_v],
        softmax_scale=softmax_scale,
        cache_seqlens=cache_seqlens,
        causal=causal,
        window=window,
        attn_sink=attn_sink,
    )


@dataclass(frozen=True)
class CacheSize:
    """Cached numbers per token and layer of one kind of attention, and what they occupy.

    Attributes:
        attention: "MLA", "MHA", "GQA-8" or "MQA".
        elements: per token and layer.
        kv_heads: into which they are divided; all heads share the latent of MLA.
    """

    attention: str
    elements: int
    kv_heads: int = 1

    def bytes_per_token(self, dtype: str, layers: int) -> int:
        """Exact bytes per token over ``layers`` layers; 1 KB is 1000 B in published figures."""
        return self.elements * format_of(dtype).itemsize * layers


def latent_cache_size(config: MLAConfig) -> CacheSize:
    """c + r elements: DeepSeek-V2 (arXiv 2405.04434), table 1."""
    return CacheSize("MLA", config.cache_dim)


def multi_head_cache_size(groups: int, k_dim: int, v_dim: int, name: str) -> CacheSize:
    """g·(k_dim + v_dim) elements; with both equal, the 2·n·d of DeepSeek-V2, table 1."""
    return CacheSize(name, groups * (k_dim + v_dim), groups)


def compared_cache_sizes(num_heads: int, k_dim: int, v_dim: int) -> list[CacheSize]:
    """What a model with these heads would cache as MHA, as GQA with 8 groups, and as MQA."""
    groups = {"MHA": num_heads, "GQA-8": 8, "MQA": 1}
    return [multi_head_cache_size(g, k_dim, v_dim, name) for name, g in groups.items() if num_heads % g == 0]


def kv_heads_on_ranks(num_heads: int, kv_heads: int, ranks: int) -> list[int]:
    """KV heads in the cache of each rank of tensor parallelism: those that its query heads read.

    Query heads are divided among the ranks. A KV head that heads of several ranks read is on all of these, as the one of MQA
    and the latent of MLA are on every rank.

    Raises:
        ValueError: ``ranks`` is below 1 or does not divide ``num_heads``.
    """
    if ranks < 1 or num_heads % ranks:
        raise ValueError(f"{num_heads} heads cannot be divided among {ranks} ranks")
    own, reading = num_heads // ranks, num_heads // kv_heads  # query heads of a rank, and of a KV head
    return [((rank + 1) * own - 1) // reading - rank * own // reading + 1 for rank in range(ranks)]


def paged_bytes(seqlens: IntArray, page_size: int, row_bytes: int) -> int:
    """Bytes of the pages that hold sequences of these lengths, in one layer."""
    pages = -(-np.asarray(seqlens, dtype=np.int64) // page_size)
    return int(pages.sum()) * page_size * row_bytes


def reduction(smaller: Fraction | int, larger: Fraction | int) -> Fraction:
    """1 − smaller/larger, exactly."""
    return 1 - Fraction(smaller) / Fraction(larger)
