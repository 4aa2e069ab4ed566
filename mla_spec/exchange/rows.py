"""Some rows of a large call, as a call of its own: one sequence or query, some heads, and what of the cache these need.

Each row of attention depends on its own query and keys alone, so an honest kernel is as near to the exact result of the part as to
that of the whole. Only a scale that several rows share joins them; such rows stay together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from mla_spec.exchange.call import Call
from mla_spec.exchange.contents import Answer


@dataclass(frozen=True)
class Part:
    """A part of a call.

    Attributes:
        call: with tensors that are copies, or views of the whole call's.
        outputs: takes the same part of the outputs of the whole call.
        heads: how many it has, and of how many.
    """

    call: Call
    outputs: Callable[[Answer], Answer]
    heads: tuple[int, int]


def choose_rows(call: Call, drawn: Random, heads: int | None = None, query_scale: str = "none") -> Part | None:
    """Rows of a call at random; None where its operation has none that can be taken out, or the call has none at all.

    One sequence with its queries is taken where a table names its pages, and one query where queries are packed or select rows. The
    pages keep their size and are those that hold its tokens, in their order.

    Args:
        heads: at most so many of them; None for all.
        query_scale: which rows of q share one scale, as ``Profile.query_scale`` says.
    """
    choose = _chooser(call)
    if choose is None or query_scale == "tensor" or call.tensors["q"].numel() == 0:
        return None
    h = call.tensors["q"].shape[-2]
    kept = torch.arange(h)
    if heads is not None and heads < h and query_scale != "token":
        kept = torch.tensor(sorted(drawn.sample(range(h), heads)))
    tensors, outputs = choose(call, drawn, kept.to(call.tensors["q"].device))
    return Part(Call(call.operation, tensors, call.values), outputs, (len(kept), h))


_Chosen = tuple[dict[str, Tensor], Callable[[Answer], Answer]]


def _chooser(call: Call) -> Callable[[Call, Random, Tensor], _Chosen] | None:
    """What takes rows of a call, by what it has; a rank's table does not say which tokens its rows are."""
    has = set(call.tensors)
    if {"kv_cache", "indices"} <= has:
        return _selecting_query
    if not {"block_table", "cache_seqlens"} <= has or "ranks" in call.values:
        return None
    return _packed_query if "cu_seqlens_q" in has else _sequence


def pool_of(call: Call) -> tuple[str, int]:
    """The name of the tensor that holds the pages of a cache, and their size."""
    if "pages" in call.tensors:
        return "pages", int(call.values["page_size"])
    return "kv_cache", call.tensors["kv_cache"].shape[1]


def _pages_of(table: Tensor, length: int, page_size: int) -> tuple[Tensor, Tensor]:
    """The pages that hold so many tokens of a row of a table, and a table of them in a pool of their own, [1, pages]."""
    needed = -(-length // page_size)
    return table[:needed].long(), torch.arange(needed, dtype=torch.int32)[None].to(table.device)


def _sinks(call: Call, heads: Tensor) -> dict[str, Tensor]:
    """The sinks of these heads, where the call has any."""
    return {name: x.index_select(0, heads) for name, x in call.tensors.items() if name == "attn_sink"}


def _sequence(call: Call, drawn: Random, heads: Tensor) -> _Chosen:
    """One sequence with its queries."""
    q, table, lengths = (call.tensors[name] for name in ("q", "block_table", "cache_seqlens"))
    pool, page_size = pool_of(call)
    i = drawn.randrange(len(q))
    one = slice(i, i + 1)
    pages, own = _pages_of(table[i], int(lengths[i]), page_size)
    tensors = {
        "q": q[one].index_select(2, heads),
        pool: call.tensors[pool][pages],
        "block_table": own,
        "cache_seqlens": lengths[one],
        **_sinks(call, heads),
    }

    def outputs(answer: Answer) -> Answer:
        return {name: x[one].index_select(1 if name == "lse" else 2, heads) for name, x in answer.items()}

    return tensors, outputs


def _packed_query(call: Call, drawn: Random, heads: Tensor) -> _Chosen:
    """One of packed queries, with the keys that it sees."""
    q, cache, table, lengths = (call.tensors[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens"))
    starts = call.tensors["cu_seqlens_q"].tolist()
    token = drawn.randrange(len(q))
    i = next(i for i in range(len(starts) - 1) if starts[i] <= token < starts[i + 1])
    seen = int(lengths[i])
    if call.values["causal"]:
        seen = max(0, seen - (starts[i + 1] - token) + 1)
    pages, own = _pages_of(table[i], seen, cache.shape[1])
    one = slice(token, token + 1)
    tensors = {
        "q": q[one].index_select(1, heads),
        "kv_cache": cache[pages],
        "block_table": own,
        "cache_seqlens": torch.full_like(lengths[:1], seen),
        "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32, device=q.device),
    }

    def outputs(answer: Answer) -> Answer:
        parts = {name: x[:, one] if name == "lse" else x[one] for name, x in answer.items()}
        return {name: x.index_select(0 if name == "lse" else 1, heads) for name, x in parts.items()}

    return tensors, outputs


def _selecting_query(call: Call, drawn: Random, heads: Tensor) -> _Chosen:
    """One query, with the rows that it selects."""
    q, cache, indices = (call.tensors[name] for name in ("q", "kv_cache", "indices"))
    i, j = drawn.randrange(q.shape[0]), drawn.randrange(q.shape[1])
    sequence, query = slice(i, i + 1), slice(j, j + 1)
    entries = indices[i, j].long()
    selects = (entries >= 0) & (entries < cache.shape[0] * cache.shape[1])
    if "topk_length" in call.tensors:
        selects &= torch.arange(len(entries), device=entries.device) < call.tensors["topk_length"][i]
    rows, moved = selected_rows(cache, entries, selects)
    tensors = {
        "q": q[sequence, query].index_select(2, heads),
        "kv_cache": rows,
        "indices": moved[None, None].to(indices.dtype),
        **_sinks(call, heads),
    }
    if "topk_length" in call.tensors:
        tensors["topk_length"] = call.tensors["topk_length"][sequence]

    def outputs(answer: Answer) -> Answer:
        parts = {name: x[sequence, :, query] if name == "lse" else x[sequence, query] for name, x in answer.items()}
        return {name: x.index_select(1 if name == "lse" else 2, heads) for name, x in parts.items()}

    return tensors, outputs


def selected_rows(cache: Tensor, indices: Tensor, selects: Tensor) -> tuple[Tensor, Tensor]:
    """The slots that are selected in as few pages as hold them, in their order, and the indices of them there, -1 for none."""
    slots, place = torch.unique(indices[selects].long(), return_inverse=True)
    page_size = cache.shape[1]
    pages = max(1, -(-len(slots) // page_size))
    rows = cache.new_zeros(pages * page_size, *cache.shape[2:])
    rows[: len(slots)] = cache[slots // page_size, slots % page_size]
    moved = torch.full_like(indices, -1)
    moved[selects] = place.to(moved.dtype)
    return rows.reshape(pages, page_size, *cache.shape[2:]), moved
