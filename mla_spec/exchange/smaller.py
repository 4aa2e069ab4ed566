"""Smaller calls of the same operation, made of parts of a call: fewer sequences, queries and heads, shorter, fewer dims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Final

import torch
from torch import Tensor

from mla_spec.exchange.call import Call
from mla_spec.exchange.rows import pool_of, selected_rows
from mla_spec.subjects.supports import Supports

Tensors = dict[str, Tensor]

CUT: Final = {"b": "sequences", "s": "queries", "h": "heads", "k": "indices", "parts": "parts"}
"""What lies along an axis of an argument, and can be left out."""


def smaller(call: Call, supports: Supports) -> Iterator[Call]:
    """Calls with less of one thing that the subject may be given, the smallest of each first.

    Each comes with pages and tables renumbered, and then with pages where they are: a fault may lie in that.
    """
    kinds = (_itself, _fewer, _fewer_packed, _shorter, _without_first_keys, _narrower)
    for found in chain.from_iterable(kind(call, supports) for kind in kinds):
        for each in (renumbered(found), without_last_pages(found), found):
            if each is not call and (found is not call or _size(each) < _size(call)):
                yield each


def _itself(call: Call, supports: Supports) -> Iterator[Call]:
    yield call


def _size(call: Call) -> int:
    return sum(x.numel() for x in call.tensors.values())


def _used(call: Call) -> tuple[str, list[Tensor]] | None:
    """The name of the pool, and which of its pages each sequence needs; None where no table says it."""
    if not {"block_table", "cache_seqlens"} <= set(call.tensors) or "ranks" in call.values:
        return None
    table, (pool, page_size) = call.tensors["block_table"], pool_of(call)
    lengths = call.tensors["cache_seqlens"].tolist()
    return pool, [row[: -(-n // page_size)].long() for row, n in zip(table, lengths, strict=True)]


def renumbered(call: Call) -> Call:
    """The call with only the pages that its lengths need, or the rows that it selects, in their order."""
    if {"kv_cache", "indices"} <= set(call.tensors):
        cache, indices = call.tensors["kv_cache"], call.tensors["indices"]
        selects = (indices >= 0) & (indices < cache.shape[0] * cache.shape[1])
        rows, moved = selected_rows(cache, indices, selects)
        return _with(call, {"kv_cache": rows, "indices": moved})
    found = _used(call)
    if found is None:
        return call
    pool, used = found
    pages, place = torch.unique(torch.cat(used), return_inverse=True)
    if len(pages) == 0:
        pages = torch.zeros(1, dtype=torch.long)
    return _with(call, {pool: call.tensors[pool][pages], **_table(call, list(place.split([len(x) for x in used])))})


def without_last_pages(call: Call) -> Call:
    """The call without the pages behind the last one that it needs, and without such entries of its tables."""
    found = _used(call)
    if found is None:
        return call
    pool, used = found
    most = max([1, *(int(x.max()) + 1 for x in used if len(x))])
    return _with(call, {pool: call.tensors[pool][:most], **_table(call, used)})


def _table(call: Call, used: list[Tensor]) -> Tensors:
    table = call.tensors["block_table"]
    own = torch.zeros(len(table), max([1, *map(len, used)]), dtype=table.dtype)
    for row, pages in zip(own, used, strict=True):
        row[: len(pages)] = pages.to(table.dtype)
    return {"block_table": own}


def _with(call: Call, tensors: Tensors, **values: object) -> Call:
    return Call(call.operation, {**call.tensors, **tensors}, {**call.values, **values})


def _halves(n: int) -> list[slice]:
    """Both halves of n things, the last first: of queries under a causal mask only these see what they saw."""
    return [slice(n // 2, n), slice(0, n - n // 2)] if n > 1 else []


def _axes(call: Call) -> dict[str, dict[str, int]]:
    """What can be left out of the call, and along which axis of which tensors; sequences that are packed are none."""
    found: dict[str, dict[str, int]] = {}
    for argument in call.signature.arguments:
        if argument.name in call.tensors:
            for axis, letter in enumerate(argument.leading_axes):
                if letter in CUT and not (letter == "b" and "cu_seqlens_q" in call.tensors):
                    found.setdefault(CUT[letter], {})[argument.name] = axis
    return found


def _fewer(call: Call, supports: Supports) -> Iterator[Call]:
    for what, axes in _axes(call).items():
        name, axis = next(iter(axes.items()))
        n = call.tensors[name].shape[axis]
        for part in _halves(n)[: 1 if what == "queries" else 2]:
            kept = len(range(*part.indices(n)))
            if what == "heads" and supports.num_heads is not None and kept not in supports.num_heads:
                continue
            if what == "indices" and kept % supports.topk_multiple:
                continue
            tensors = {name: call.tensors[name].narrow(axis, part.start, kept) for name, axis in axes.items()}
            if what == "indices" and "topk_length" in call.tensors:
                tensors["topk_length"] = (call.tensors["topk_length"] - part.start).clamp(0, kept)
            yield _with(call, tensors)


def _fewer_packed(call: Call, supports: Supports) -> Iterator[Call]:
    """Half of packed sequences, and the last half of the queries of each."""
    if "cu_seqlens_q" not in call.tensors:
        return
    tokens = _spans(call.tensors["cu_seqlens_q"])
    keys = _spans(call.tensors["cu_seqlens_k"]) if "cu_seqlens_k" in call.tensors else None
    for part in _halves(len(tokens)):
        kept = {name: call.tensors[name][part] for name in ("block_table", "cache_seqlens") if name in call.tensors}
        packed = _packed(call, "q", tokens[part])
        if keys is not None:
            packed |= _packed(call, "k", keys[part])
        yield _with(call, kept | packed)
    if any(len(span) > 1 for span in tokens):
        yield _with(call, _packed(call, "q", [span[len(span) // 2 :] for span in tokens]))


def _spans(starts: Tensor) -> list[range]:
    return [range(a, b) for a, b in pairwise(starts.tolist())]


def _packed(call: Call, name: str, spans: list[range]) -> Tensors:
    """Tokens of each sequence on one axis, and where they begin; v goes with k."""
    tokens = torch.tensor([token for span in spans for token in span], dtype=torch.long)
    starts = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0)
    offsets = f"cu_seqlens_{name}"
    names = ["k", "v"] if name == "k" else [name]
    return {x: call.tensors[x][tokens] for x in names} | {offsets: starts.to(call.tensors[offsets].dtype)}


def _shorter(call: Call, supports: Supports) -> Iterator[Call]:
    """Half the lengths, then three quarters, and so on until one token goes; no shorter than there are queries."""
    if "cache_seqlens" not in call.tensors:
        return
    lengths = call.tensors["cache_seqlens"]
    least = lengths.minimum(_queries(call))
    step = int(lengths.max()) if lengths.numel() else 0
    while step > 1:
        step = step // 2
        fewer = (lengths - step).maximum(least)
        if bool((fewer < lengths).any()):
            yield _with(call, {"cache_seqlens": fewer})


def _queries(call: Call) -> Tensor:
    """How many each sequence has."""
    lengths = call.tensors["cache_seqlens"]
    if "cu_seqlens_q" in call.tensors:
        return call.tensors["cu_seqlens_q"].diff().to(lengths.dtype)
    return torch.full_like(lengths, call.tensors["q"].shape[1])


def _without_first_keys(call: Call, supports: Supports) -> Iterator[Call]:
    """Half of the first pages of every sequence go, or of the first packed keys: the last ones keep their places."""
    if "cu_seqlens_k" in call.tensors:
        spans = _spans(call.tensors["cu_seqlens_k"])
        if any(len(span) > 1 for span in spans):
            yield _with(call, _packed(call, "k", [span[len(span) // 2 :] for span in spans]))
        return
    if "block_table" not in call.tensors or "ranks" in call.values:
        return
    table, lengths, (_, page_size) = call.tensors["block_table"], call.tensors["cache_seqlens"], pool_of(call)
    room = int(((lengths - _queries(call)).clamp(min=0) // page_size).min()) if lengths.numel() else 0
    gone = room
    while gone > 0:
        yield _with(call, {"block_table": table[:, gone:], "cache_seqlens": lengths - gone * page_size})
        gone //= 2


def _narrower(call: Call, supports: Supports) -> Iterator[Call]:
    """Half of the latent dims, and half of the rope dims, where the subject takes any."""
    if not {"q", "kv_cache"} <= set(call.tensors) or "ranks" in call.values or supports.latent_dims is not None:
        return
    width, c = call.tensors["q"].shape[-1], call.values["head_dim_v"]
    for kept, rope in ((c // 2, width - c), (c, (width - c) // 2)):
        if 0 < kept <= c <= width and (kept, rope) != (c, width - c):
            columns = torch.tensor([*range(kept), *range(c, c + rope)])
            tensors = {name: call.tensors[name][..., columns] for name in ("q", "kv_cache")}
            yield _with(call, tensors, head_dim_v=kept)


Fails = Callable[[Call], bool]


def smallest(call: Call, supports: Supports, fails: Fails, goes_on: Callable[[], bool]) -> Call:
    """A call, made of parts of one that fails, of which no smaller one was found that fails.

    Args:
        fails: whether a call fails as the first one does.
        goes_on: whether there is time for another one.
    """
    found: Call | None = call
    while found is not None:
        call = found
        found = next((each for each in smaller(call, supports) if goes_on() and fails(each)), None)
    return call
