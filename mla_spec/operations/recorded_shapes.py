"""The shapes of recorded calls, as lines of a workload."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

from mla_spec.exchange.call import Call
from mla_spec.exchange.rows import pool_of
from mla_spec.exchange.source import recorded_calls


def recorded_shapes(path: str, fields: Mapping[str, Collection[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of a call in a folder and its shape, as a line of a workload; each shape once.

    Calls of other operations, and what cannot be read, are passed over.

    Args:
        fields: of a line, by operation.

    Raises:
        ExchangeError: the folder holds no recorded calls, or is damaged.
    """
    seen: list[dict[str, Any]] = []
    for each in recorded_calls(path):
        call = _decode_of(each.call) if isinstance(each.call, Call) else None
        if call is None or call.operation not in fields:
            continue
        entry = {"operation": call.operation, **{name: _READ[name](call) for name in fields[call.operation]}}
        if entry not in seen:
            seen.append(entry)
            yield each.name, entry


def _decode_of(call: Call) -> Call | None:
    """The call; a decode in place of packed queries over pages, where all sequences have as many, and else None."""
    if not {"cu_seqlens_q", "block_table"} <= set(call.tensors):
        return call
    counts = call.tensors["cu_seqlens_q"].diff().tolist()
    if not counts or len(set(counts)) > 1 or counts[0] < 1:
        return None
    q = call.tensors["q"].unflatten(0, (len(counts), counts[0]))  # type: ignore[no-untyped-call]
    return Call("decode", {**call.tensors, "q": q}, call.values)


_READ: Final[dict[str, Callable[[Call], Any]]] = {
    "seqlens": lambda call: call.tensors["cache_seqlens"].tolist(),
    "seqlens_q": lambda call: call.tensors["cu_seqlens_q"].diff().tolist(),
    "seqlens_k": lambda call: call.tensors["cu_seqlens_k"].diff().tolist(),
    "batch": lambda call: call.tensors["q"].shape[0],
    "s": lambda call: call.tensors["q"].shape[1],
    "num_heads": lambda call: call.tensors["q"].shape[-2],
    "kv_lora_rank": lambda call: call.values["head_dim_v"],
    "qk_rope_head_dim": lambda call: call.tensors["q"].shape[-1] - call.values["head_dim_v"],
    "qk_head_dim": lambda call: call.tensors["q"].shape[-1],
    "v_head_dim": lambda call: call.tensors["v"].shape[-1],
    "page_size": lambda call: pool_of(call)[1],
    "pages": lambda call: call.tensors["kv_cache"].shape[0],
    "topk": lambda call: call.tensors["indices"].shape[-1],
    "format": lambda call: call.values["format"],
    "causal": lambda call: call.values["causal"],
}
"""How a field of a line is read from a call."""
