"""Keys of each sequence spread over ranks, as context parallelism does: what each rank is given, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.operations.decode import DecodeInputs
from mla_spec.operations.prefill import PrefillInputs
from mla_spec.reference.typing import IntArray

PLACEMENTS = ("contiguous", "round robin", "zigzag")


def owners(tokens: int, ranks: int, placement: str) -> IntArray:
    """The rank of each token of a sequence, [tokens].

    "contiguous" gives each rank one run of tokens, "round robin" deals them singly. "zigzag" gives rank i the runs i and
    2·ranks - 1 - i of 2·ranks, so that under a causal mask all ranks have as much to do. Ranks may get nothing.
    """
    token = np.arange(tokens)
    if placement == "round robin":
        return token % ranks
    if placement == "contiguous":
        return token * ranks // max(tokens, 1)
    run = token * 2 * ranks // max(tokens, 1)
    return np.minimum(run, 2 * ranks - 1 - run)


def decode_ranks(inputs: DecodeInputs, ranks: int, placement: str) -> list[DecodeInputs]:
    """Each rank's decode: its keys in pages of its own, and every query as a sequence of one.

    The keys that a query sees are the first of the rank's own, as many as the rank has of them. Queries of one sequence share
    the pages of its keys.
    """
    lengths = inputs.cache_seqlens
    owner = [owners(int(n), ranks, placement) for n in lengths]
    return [_decode_rank(inputs, [np.flatnonzero(o == rank) for o in owner]) for rank in range(ranks)]


def _decode_rank(inputs: DecodeInputs, tokens: list[IntArray]) -> DecodeInputs:
    """Decode over ``tokens`` of each sequence's keys."""
    b, s, h, d = inputs.q.shape
    page_size = inputs.kv_cache.shape[1]
    width = -(-max(1, *(len(own) for own in tokens)) // page_size)  # pages of a sequence
    cache = np.zeros((b * width, *inputs.kv_cache.shape[1:]))
    for i, own in enumerate(tokens):
        rows = inputs.kv_cache[inputs.block_table[i, own // page_size], own % page_size]
        cache[i * width : (i + 1) * width].reshape(-1, 1, d)[: len(own)] = rows
    table = np.arange(b * width, dtype=np.int32).reshape(b, width)
    first_hidden = inputs.cache_seqlens[:, None] + (np.arange(s) - s + 1 if inputs.causal else np.zeros(s, dtype=int))
    seen = [[int((own < end).sum()) for end in ends] for own, ends in zip(tokens, first_hidden, strict=True)]
    return replace(
        inputs,
        q=inputs.q.reshape(b * s, 1, h, d),
        kv_cache=cache,
        block_table=np.repeat(table, s, axis=0),
        cache_seqlens=np.array(seen, dtype=np.int32).reshape(-1),
        causal=False,
    )


@dataclass(frozen=True)
class RingStep:
    """One rank's attention to the keys of one rank.

    Attributes:
        queries: which query tokens it is of.
        keys: the rank that the keys come from.
        inputs: arguments of ``prefill``.
    """

    queries: IntArray
    keys: int
    inputs: PrefillInputs


def ring_steps(inputs: PrefillInputs, ranks: int) -> Iterator[RingStep]:
    """The steps of causal ring attention over packed sequences with as many queries as keys, placed in zigzag.

    With its own keys a rank's mask is causal. Of the keys of an earlier rank all its queries see the first run and none the
    second; of those of a later rank its second run of queries sees both, and its first none. Steps without any query or key
    are left out.
    """
    edges = [
        start + (stop - start) * np.arange(2 * ranks + 1) // (2 * ranks)
        for start, stop in zip(inputs.cu_seqlens_q[:-1], inputs.cu_seqlens_q[1:], strict=True)
    ]
    runs = [[np.arange(edge[i], edge[i + 1]) for i in range(2 * ranks)] for edge in edges]
    first = [[run[rank] for run in runs] for rank in range(ranks)]
    second = [[run[2 * ranks - 1 - rank] for run in runs] for rank in range(ranks)]
    both = [[np.concatenate(pair) for pair in zip(*halves, strict=True)] for halves in zip(first, second, strict=True)]
    for mine in range(ranks):
        for theirs in range(ranks):
            queries = second[mine] if theirs > mine else both[mine]
            keys = first[theirs] if theirs < mine else both[theirs]
            if sum(map(len, queries)) and sum(map(len, keys)):
                step = _packed(inputs, queries, keys, causal=theirs == mine)
                yield RingStep(np.concatenate(queries), theirs, step)


def _packed(inputs: PrefillInputs, queries: list[IntArray], keys: list[IntArray], *, causal: bool) -> PrefillInputs:
    """Some tokens of every sequence, packed."""
    taken_q, taken_k = np.concatenate(queries), np.concatenate(keys)
    offsets = [np.cumsum([0, *map(len, tokens)]).astype(np.int32) for tokens in (queries, keys)]
    return replace(
        inputs,
        q=inputs.q[taken_q],
        k=inputs.k[taken_k],
        v=inputs.v[taken_k],
        cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1],
        causal=causal,
    )
