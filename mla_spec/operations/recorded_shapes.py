"""The shapes of recorded calls, as lines of a workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mla_spec.exchange.call import Call
from mla_spec.exchange.source import recorded_calls


def recorded_shapes(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of a call in a folder and its shape, in fields of ``workload.FIELDS``; each shape once.

    Calls of other operations, and what cannot be read, are passed over.

    Raises:
        ExchangeError: the folder holds no recorded calls, or is damaged.
    """
    seen: list[dict[str, Any]] = []
    for each in recorded_calls(path):
        shape = _SHAPES.get(each.call.operation) if isinstance(each.call, Call) else None
        entry = None if shape is None or not isinstance(each.call, Call) else shape(each.call)
        if entry is not None and entry not in seen:
            seen.append(entry)
            yield each.name, entry


def _latent(call: Call) -> dict[str, int]:
    width, c = call.tensors["q"].shape[-1], call.values["head_dim_v"]
    return {"num_heads": call.tensors["q"].shape[-2], "kv_lora_rank": c, "qk_rope_head_dim": width - c}


def _decode(call: Call) -> dict[str, Any]:
    return {
        "operation": "decode",
        "seqlens": call.tensors["cache_seqlens"].tolist(),
        "s": call.tensors["q"].shape[1],
        **_latent(call),
        "page_size": call.tensors["kv_cache"].shape[1],
        "causal": call.values["causal"],
    }


def _ragged(call: Call) -> dict[str, Any] | None:
    """A decode, where all sequences have as many queries."""
    counts = call.tensors["cu_seqlens_q"].diff().tolist()
    if not counts or len(set(counts)) > 1 or counts[0] < 1:
        return None
    q = call.tensors["q"].unflatten(0, (len(counts), counts[0]))  # type: ignore[no-untyped-call]
    return _decode(Call("decode", {**call.tensors, "q": q}, call.values))


def _prefill(call: Call) -> dict[str, Any]:
    return {
        "operation": "prefill",
        "seqlens_q": call.tensors["cu_seqlens_q"].diff().tolist(),
        "seqlens_k": call.tensors["cu_seqlens_k"].diff().tolist(),
        "num_heads": call.tensors["q"].shape[1],
        "qk_head_dim": call.tensors["q"].shape[-1],
        "v_head_dim": call.tensors["v"].shape[-1],
        "causal": call.values["causal"],
    }


def _quantized(call: Call) -> dict[str, Any]:
    return {
        "operation": "decode_quantized",
        "seqlens": call.tensors["cache_seqlens"].tolist(),
        "s": call.tensors["q"].shape[1],
        "num_heads": call.tensors["q"].shape[2],
        "page_size": call.values["page_size"],
        "format": call.values["format"],
        "causal": call.values["causal"],
    }


def _sparse(call: Call) -> dict[str, Any]:
    pages, page_size = call.tensors["kv_cache"].shape[:2]
    return {
        "operation": "sparse_decode",
        "batch": call.tensors["q"].shape[0],
        "s": call.tensors["q"].shape[1],
        **_latent(call),
        "page_size": page_size,
        "pages": pages,
        "topk": call.tensors["indices"].shape[-1],
    }


_SHAPES: dict[str, Callable[[Call], dict[str, Any] | None]] = {
    "decode": _decode,
    "ragged_decode": _ragged,
    "prefill": _prefill,
    "decode_quantized": _quantized,
    "sparse_decode": _sparse,
}
