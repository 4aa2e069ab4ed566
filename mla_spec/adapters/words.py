"""The words in which a row of ``signatures`` says what a kernel is given: tables and memory made from a contract's arguments.

A word stands for Python text that an adapter's method holds. What takes more than an expression is a function here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.subjects.violation import Violation

_DECODE: Mapping[str, str] = {
    "q": "q",
    "q_latent": "q[..., :c]",
    "q_pe": "q[..., c:]",
    "kv": "kv_cache",
    "latent": "kv_cache[..., :c]",
    "k_pe": "kv_cache[..., c:]",
    "block_table": "block_table",
    "seqlens": "cache_seqlens",
    "longest": "int(cache_seqlens.max())",
    "query_indptr": "query_indptr(q)",
    "page_indptr": "indptr(page_counts(cache_seqlens, n))",
    "page_indices": "page_indices(block_table, cache_seqlens, n)",
    "last_page_len": "last_page_len(cache_seqlens, n)",
    "slot_indptr": "indptr(cache_seqlens)",
    "slot_indices": "slot_indices(block_table, cache_seqlens, n)",
    "prefix_indptr": "indptr(cache_seqlens - s)",
    "prefix_indices": "slot_indices(block_table, cache_seqlens - s, n)",
    "new_kv": "new_rows(kv_cache, block_table, cache_seqlens, query_indptr(q))",
    "new_latent": "new_rows(kv_cache, block_table, cache_seqlens, query_indptr(q))[..., :c]",
    "metadata": "scheduler_metadata(kernel)",
    "workspace": "workspace(q.device)",
    "four_splits": "torch.full((b,), 4, dtype=torch.int32, device=q.device)",
    "scale": "softmax_scale",
    "causal": "causal",
    "heads": "h",
    "queries": "s",
    "page_size": "n",
    "kv_lora_rank": "c",
    "qk_rope_head_dim": "r",
    "dtype": "q.dtype",
}

_PACKED: Mapping[str, str] = {
    "query_indptr": "cu_seqlens_q",
    "prefix_indptr": "indptr(cache_seqlens - cu_seqlens_q.diff())",
    "prefix_indices": "slot_indices(block_table, cache_seqlens - cu_seqlens_q.diff(), n)",
    "new_kv": "new_rows(kv_cache, block_table, cache_seqlens, cu_seqlens_q)",
    "new_latent": "new_rows(kv_cache, block_table, cache_seqlens, cu_seqlens_q)[..., :c]",
    "queries": "int(cu_seqlens_q.diff().max())",
}
"""Of packed queries, what differs from a batch in which every sequence has as many."""

_OF_A_RANK: Mapping[str, str] = {
    "own_seqlens": "own",
    "longest_own": "max(1, int(own.max()))",
    "ranks": "ranks",
    "rank": "rank",
}
"""Of context parallelism, what is added; "seqlens" are those of whole sequences."""

WORDS: Mapping[str, Mapping[str, str]] = {
    "decode": _DECODE,
    "ragged_decode": {**_DECODE, **_PACKED},
    "rank_decode": {**_DECODE, **_OF_A_RANK},
    "prefill": {
        "q": "q",
        "k": "k",
        "v": "v",
        "cu_seqlens_q": "cu_seqlens_q",
        "cu_seqlens_k": "cu_seqlens_k",
        "longest_q": "int(cu_seqlens_q.diff().max())",
        "longest_k": "int(cu_seqlens_k.diff().max())",
        "padded_q": "padded(q, cu_seqlens_q)",
        "padded_k": "padded(k, cu_seqlens_k)",
        "padded_v": "padded(v, cu_seqlens_k)",
        "mask": "bottom_right_mask(cu_seqlens_q, cu_seqlens_k, causal)",
        "scale": "softmax_scale",
        "causal": "causal",
    },
}
"""By operation, each word and what it stands for; ``signatures`` has the letters."""

HELPERS = (
    "bottom_right_mask",
    "expect_shape",
    "indptr",
    "last_page_len",
    "natural",
    "new_rows",
    "own_tokens",
    "padded",
    "page_counts",
    "page_indices",
    "parts",
    "query_indptr",
    "scheduler_metadata",
    "slot_indices",
    "unpadded",
    "workspace",
)
"""Functions of this module that words and adapters name."""


def indptr(counts: Tensor) -> Tensor:
    """Where each sequence's entries begin and end, int32 [b + 1]; negative counts are none."""
    return F.pad(counts.clamp(min=0).cumsum(0), (1, 0)).to(torch.int32)


def query_indptr(q: Tensor) -> Tensor:
    """Where each sequence's queries begin and end among the b·s of q [b, s, ...], int32 [b + 1]."""
    return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]


def own_tokens(cache_seqlens: Tensor, ranks: int, rank: int, interleave: int) -> Tensor:
    """How many tokens of each sequence a rank holds, int32 [b]: token i is that of rank i // interleave % ranks."""
    rounds, rest = cache_seqlens // (ranks * interleave), cache_seqlens % (ranks * interleave)
    return (rounds * interleave + (rest - rank * interleave).clamp(0, interleave)).to(torch.int32)


def page_counts(cache_seqlens: Tensor, page_size: int) -> Tensor:
    """Pages of each sequence, [b]."""
    return (cache_seqlens + page_size - 1) // page_size


def page_indices(block_table: Tensor, cache_seqlens: Tensor, page_size: int) -> Tensor:
    """The pages of one sequence after those of another, int32."""
    counts = page_counts(cache_seqlens, page_size)
    return block_table[torch.arange(block_table.shape[1], device=block_table.device) < counts[:, None]]


def last_page_len(cache_seqlens: Tensor, page_size: int) -> Tensor:
    """Tokens in each sequence's last page, int32 [b]; 0 where it has none."""
    return torch.where(cache_seqlens > 0, (cache_seqlens - 1) % page_size + 1, 0).to(torch.int32)


def slot_indices(block_table: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """The slots (page · page_size + place) of the first ``lengths`` tokens of each sequence, one after the other, int64."""
    token = torch.arange(block_table.shape[1] * page_size, device=block_table.device)
    slots = block_table.long()[:, token // page_size] * page_size + token % page_size  # [b, t]
    return slots[token < lengths[:, None]]


def new_rows(kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """The rows of each sequence's last tokens, as many as it has queries, [tokens, 1, c+r]."""
    page_size, queries = kv_cache.shape[1], cu_seqlens_q.diff()
    sequence = torch.arange(len(queries), device=queries.device).repeat_interleave(queries)  # [tokens]
    first = cache_seqlens.long() - queries - cu_seqlens_q[:-1]  # [b]: from the number of a token to its place
    token = torch.arange(len(sequence), device=queries.device) + first[sequence]
    return kv_cache[block_table[sequence, token // page_size].long(), token % page_size]


def scheduler_metadata(kernel: object) -> Any:
    """What ``get_mla_metadata`` of the kernel's own module makes for one call; None where there is no such function.

    Made anew for every call: it may be used again only for the same lengths.
    """
    make = getattr(sys.modules.get(getattr(kernel, "__module__", "")), "get_mla_metadata", None)
    return None if make is None else make()[0]


@cache
def workspace(device: torch.device) -> Tensor:
    """128 MiB of zeros, which calls share as those of a server do."""
    return torch.zeros(128 * 1024 * 1024, dtype=torch.uint8, device=device)


def padded(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed x [tokens, h, d] with every sequence padded by zeros to the longest, of one token at least; [b, h, t, d]."""
    offsets = cu_seqlens.tolist()
    longest = max(1, int(cu_seqlens.diff().max()))
    rows = [F.pad(x[i:j], (0, 0, 0, 0, 0, longest - (j - i))) for i, j in pairwise(offsets)]
    return torch.stack(rows).transpose(1, 2)


def unpadded(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The inverse of ``padded``."""
    return torch.cat([rows[:, :n].transpose(0, 1) for rows, n in zip(x, cu_seqlens.diff().tolist(), strict=True)])


def bottom_right_mask(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
    """Which keys the queries of a padded batch see, bool [b, 1, s, t]; a query of the padding sees none."""
    s, t = cu_seqlens_q.diff(), cu_seqlens_k.diff()  # [b]
    query = torch.arange(max(1, int(s.max())), device=s.device)[None, :, None]
    key = torch.arange(max(1, int(t.max())), device=s.device)[None, None, :]
    s, t = s[:, None, None], t[:, None, None]
    visible = (query < s) & (key < t)
    if causal:
        visible = visible & (key <= t - s + query)
    return visible[:, None]


def expect_shape(x: Tensor, what: str, axes: str, shape: tuple[int, ...]) -> Tensor:
    """x itself; Violation unless it has the shape that the signature states."""
    if not isinstance(x, Tensor):
        raise Violation(f"{what} must be a tensor [{axes}], got {type(x).__name__}")
    if tuple(x.shape) != shape:
        other = ": the same axes in another order" if sorted(x.shape) == sorted(shape) else ""
        raise Violation(f"{what} must be [{axes}] = {list(shape)} in this signature, got {list(x.shape)}{other}")
    return x


def parts(returned: Any, names: str) -> tuple[Any, ...]:
    """The first of what a kernel returned, as many as there are ``names``; Violation where there are fewer."""
    count = len(names.split(","))
    if not isinstance(returned, tuple | list) or len(returned) < count:
        raise Violation(f"this signature returns ({names}), got {type(returned).__name__}")
    return tuple(returned[:count])


def natural(lse: Tensor) -> Tensor:
    """An LSE of base 2 as a natural logarithm of the same dtype, rounded once."""
    return (lse.double() * math.log(2)).to(lse.dtype)
