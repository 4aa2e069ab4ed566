"""Queries, pages and tables of dense attention over latent pages: what calls have in common, and how cases draw them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array, IntArray

CANCELLATION = 16.0
"""By how much the products of a score are larger than the score in the regime "cancelling"."""


@dataclass(frozen=True)
class Paged:
    """What attention over pages is built of: float64 values exactly representable in the dtype, and a table.

    Attributes:
        q: [tokens, h, c+r], the queries of all sequences on one axis.
        kv_cache: [pages, page_size, 1, c+r], pages in random order in a pool with spare pages.
        block_table: [b, max pages]; entries that no sequence needs name any page.
    """

    q: Array
    kv_cache: Array
    block_table: IntArray
    softmax_scale: float


@dataclass(frozen=True)
class PagedInputs:
    """What calls of attention over pages have in common: float64 values exactly representable in the dtype, and tables."""

    q: Array  # [b, s, h, c+r] or [tokens, h, c+r]
    kv_cache: Array  # [pages, page_size, 1, c+r]
    block_table: IntArray  # [b, max pages]
    cache_seqlens: IntArray  # [b]
    head_dim_v: int
    softmax_scale: float
    causal: bool


P = TypeVar("P", bound=PagedInputs)


def at_half_the_scale(inputs: P) -> P:
    """The same, flatter."""
    return replace(inputs, softmax_scale=inputs.softmax_scale / 2)


def without_spare_pages(inputs: P) -> tuple[P, IntArray]:
    """A pool of the pages that sequences need, in the order of their numbers, and which they were; tables as wide as needed."""
    needed = -(-inputs.cache_seqlens // inputs.kv_cache.shape[1])  # [b]
    width = max(1, int(needed.max()))
    table = inputs.block_table[:, :width]
    used = np.arange(width) < needed[:, None]  # [b, width]
    pages = np.unique(table[used])
    pages = pages if len(pages) else np.zeros(1, dtype=int)
    renamed = np.where(used, np.searchsorted(pages, table), 0).astype(np.int32)
    return replace(inputs, kv_cache=inputs.kv_cache[pages], block_table=renamed), pages


class LatentPages:
    """What cases of attention over latent pages have. ``DecodeCase`` says what the fields mean."""

    dtype: str
    num_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    page_size: int
    logit_std: float
    regime: str
    shared_pages: int

    def pages_of(self, lengths: tuple[int, ...]) -> list[int]:
        """How many pages sequences of these lengths need."""
        return [-(-n // self.page_size) for n in lengths]

    def paged(self, rng: np.random.Generator, queries: tuple[int, ...], keys: tuple[int, ...]) -> Paged:
        """So many queries and keys of each sequence; unused slots and entries harmless."""
        c, d, needed = self.kv_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim, self.pages_of(keys)
        width = max(needed) + 2
        pool = (self.shared_pages or sum(needed)) + 3
        table = rng.integers(0, pool, (len(keys), width)).astype(np.int32)
        pages, start = rng.permutation(pool), 0
        for row, count in zip(table, needed, strict=True):
            if self.shared_pages:
                row[:count] = np.resize(rng.permutation(pages[:-3]), count)
            else:
                row[:count] = pages[start : start + count]
            start += count
        cache = self._rows(rng, (pool, self.page_size, 1), c, d)
        q = rng.standard_normal((sum(queries), self.num_heads, d))
        scale = self.logit_std / np.sqrt(c / 4 + self.qk_rope_head_dim)
        if self.regime == "cancelling":
            q[..., 1:c:2] = q[..., 0 : c - 1 : 2]
            q[..., c:] /= CANCELLATION
            scale *= CANCELLATION
        if self.regime == "negative":
            scale = -scale
        if self.regime == "sunken":
            q[..., :c] = -np.abs(q[..., :c]) * np.sign(cache[0, 0, 0, :c])
            q[..., c:] = 0.0
        if self.regime == "sink":
            offsets = np.cumsum([0, *queries])
            for first, own in zip(table[:, 0], np.split(q, offsets[1:-1]), strict=True):
                cache[first, 0, 0] = np.abs(cache[first, 0, 0]) * np.sign(own.sum(axis=(0, 1)))
        return Paged(round_to(q, self.dtype), round_to(cache, self.dtype), table, float(scale))

    def _rows(self, rng: np.random.Generator, lead: tuple[int, ...], c: int, d: int) -> Array:
        rows = rng.standard_normal((*lead, d))
        mean = rng.choice([-1.0, 1.0], c)
        spread = np.full(c, 0.5)
        if self.regime == "offset":
            mean, spread = 8 * mean, np.full(c, 0.25)
        if self.regime == "outlier":
            mean, spread = mean, np.where(rng.random(c) < 0.1, 15.0, 0.5)
        rows[..., :c] = mean + spread * rows[..., :c]
        if self.regime == "sunken":
            rows[..., :c] = mean * (0.5 + np.abs(rows[..., :c]))
        if self.regime == "cancelling":
            rows[..., 1:c:2] = rows[..., 1:c:2] / CANCELLATION - rows[..., 0 : c - 1 : 2]
        if self.regime == "ties":
            rows[1::2] = rows[: rows.shape[0] // 2]
        return rows
