"""Pages and table entries that calls of attention over a paged cache may read, and calls whose pages are changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mla_spec.operations.latent_pages import P, PagedInputs
from mla_spec.reference.typing import BoolArray, IntArray


def unused_slots(inputs: PagedInputs) -> BoolArray:
    """Which slots hold no token, [pages, page_size]."""
    pages, page_size = inputs.kv_cache.shape[:2]
    unused = np.ones((pages, page_size), dtype=bool)
    for table, length in zip(inputs.block_table, inputs.cache_seqlens, strict=True):
        token = np.arange(length)
        unused[table[token // page_size], token % page_size] = False
    return unused


def used_entries(inputs: PagedInputs) -> BoolArray:
    """Which table entries are needed, [b, max pages]."""
    page_size = inputs.kv_cache.shape[1]
    needed = -(-inputs.cache_seqlens // page_size)
    used: BoolArray = np.arange(inputs.block_table.shape[1]) < needed[:, None]
    return used


def spare_page(inputs: PagedInputs) -> int:
    """A page that holds no token."""
    return int(np.flatnonzero(unused_slots(inputs).all(axis=1))[0])


def other_unused_entries(inputs: PagedInputs) -> Iterator[tuple[int, IntArray]]:
    """What may stand in the table past a sequence's pages, a page without tokens or no page at all, and the table with it."""
    for entry in (spare_page(inputs), -1, 2**31 - 1):
        yield entry, np.where(used_entries(inputs), inputs.block_table, entry).astype(np.int32)


def relabelled(inputs: P, seed: int) -> tuple[P, bool]:
    """The same call with its pages in another order of the pool, and whether a page that is needed has moved."""
    pages = inputs.kv_cache.shape[0]
    name = np.random.default_rng([seed, 2]).permutation(pages)  # page p becomes name[p]
    used = inputs.block_table[used_entries(inputs)]
    cache = np.empty_like(inputs.kv_cache)
    cache[name] = inputs.kv_cache
    moved = replace(inputs, kv_cache=cache, block_table=name[inputs.block_table].astype(np.int32))
    return moved, bool((name[used] != used).any())


def with_other_last_keys(inputs: P, count: int) -> P:
    """The last ``count`` keys of every sequence replaced by their negatives."""
    page_size = inputs.kv_cache.shape[1]
    token = inputs.cache_seqlens[:, None] - 1 - np.arange(count)  # [b, count]
    sequence, last = np.nonzero(token >= 0)
    token = token[sequence, last]
    slots = inputs.block_table[sequence, token // page_size], token % page_size
    cache = inputs.kv_cache.copy()
    cache[slots] = -cache[slots]
    return replace(inputs, kv_cache=cache)
