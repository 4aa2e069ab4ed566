"""The results of a case, in ball or rational arithmetic. Importing this module needs python-flint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.golden.cases.case import (
    Parameters,
    Values,
    config_from,
    indexer_config_from,
    layer_weights,
    rope_from,
)
from mla_spec.golden.exact import (
    ball_gradients as certified_gradients,
)
from mla_spec.golden.exact import (
    ball_sparse as certified_sparse,
)
from mla_spec.golden.exact import (
    balls as certified,
)
from mla_spec.golden.exact import (
    rationals as exact,
)
from mla_spec.golden.exact.balls import Balls


def expected(operation: str, inputs: Values, parameters: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The results by name: floating-point ones correctly rounded to float64, bytes as uint8, indices as int32."""
    if operation in RATIONAL:
        return RATIONAL[operation](inputs, parameters)
    names: list[str] = []

    def compute() -> list[Balls]:
        results = enclosures(operation, inputs, parameters)
        names[:] = results
        return list(results.values())

    values = certified.rounded(compute)
    return dict(zip(names, values, strict=True))


def enclosures(operation: str, inputs: Values, parameters: Mapping[str, Any]) -> dict[str, Balls]:
    """Balls that hold the exact results, by name, at the working precision."""
    return ENCLOSURES[operation](inputs, parameters)


def _rope_table(x: Values, parameters: Parameters) -> dict[str, Balls]:
    rope = rope_from(parameters["rope"])
    cos, sin = certified.cos_sin(x["positions"], rope)
    return {"frequencies": certified.rope_frequencies(rope), "cos": cos, "sin": sin}


def _rope(x: Values, parameters: Parameters) -> dict[str, Balls]:
    return {"out": certified.rotate(x["x"], x["positions"], rope_from(parameters["rope"]))}


def _absorb(x: Values, parameters: Parameters) -> dict[str, Balls]:
    w_uk, w_uv = certified.absorb(x["kv_b_proj"], config_from(parameters["config"]))
    return {"w_uk": w_uk, "w_uv": w_uv}


def _absorption(x: Values, parameters: Parameters) -> dict[str, Balls]:
    """Attention of each sequence to its latents, from the explicit form."""
    w_uk, w_uv = certified.absorb(x["kv_b_proj"], config_from(parameters["config"]))
    operands = zip(*(certified.ball(x[name]) for name in ("q_nope", "q_pe", "latent", "k_pe")), strict=True)
    scale = certified.arb(parameters["softmax_scale"])
    return {"out": np.stack([certified.explicit(*each, w_uk, w_uv, scale) for each in operands])}


def _rms_norm(x: Values, parameters: Parameters) -> dict[str, Balls]:
    return {"out": certified.rms_norm(x["x"], x["weight"], parameters["eps"])}


def _layer(x: Values, parameters: Parameters) -> dict[str, Balls]:
    prompt = parameters["prompt"]
    out = certified.layer(x["hidden"], x["positions"], layer_weights(x), config_from(parameters["config"]))
    return {"prefill": out[:, :prompt], "decode": out[:, prompt:]}


def _prefill(x: Values, parameters: Parameters) -> dict[str, Balls]:
    scale, window = certified.arb(parameters["softmax_scale"]), parameters.get("window")
    out, lse = certified.prefill(**x, scale=scale, causal=parameters["causal"], window=window)
    return {"out": out, "lse": lse}


def _decode(x: Values, parameters: Parameters) -> dict[str, Balls]:
    scale = certified.arb(parameters["softmax_scale"])
    options = {"causal": parameters["causal"], "window": parameters.get("window")}
    out, lse = certified.decode(**x, head_dim_v=parameters["head_dim_v"], scale=scale, **options)
    return {"out": out, "lse": lse}


def _ragged_decode(x: Values, parameters: Parameters) -> dict[str, Balls]:
    scale, width = certified.arb(parameters["softmax_scale"]), parameters["head_dim_v"]
    out, lse = certified.ragged_decode(**x, head_dim_v=width, scale=scale, causal=parameters["causal"])
    return {"out": out, "lse": lse}


def _rank_decode(x: Values, parameters: Parameters) -> dict[str, Balls]:
    others = {name: value for name, value in parameters.items() if name != "softmax_scale"}
    out, lse = certified.rank_decode(**x, scale=certified.arb(parameters["softmax_scale"]), **others)
    return {"out": out, "lse": lse}


def _merge(x: Values, parameters: Parameters) -> dict[str, Balls]:
    out, lse = certified.merge(x["outs"], x["lses"])
    return {"out": out, "lse": lse}


def _partial_rope(x: Values, parameters: Parameters) -> dict[str, Balls]:
    return {
        "out": certified_sparse.rotate_part(x["x"], x["positions"], rope_from(parameters["rope"]), parameters["start"])
    }


def _decode_quantized(x: Values, parameters: Parameters) -> dict[str, Balls]:
    pages, size = x["pages"], parameters["page_size"]
    rows = exact.unpack(pages, parameters["layout"], size, len(pages) * size, parameters["tensor_scale"])
    kv_cache = rows.reshape(len(pages), size, 1, -1)
    paged = {name: x[name] for name in ("q", "block_table", "cache_seqlens")}
    return _decode({**paged, "kv_cache": kv_cache}, parameters)


def _sparse_prefill(x: Values, parameters: Parameters) -> dict[str, Balls]:
    out, max_logits, lse = _sparse(x["q"], x["kv"][:, 0], x["indices"][:, 0], x.get("topk_length"), x, parameters)
    return {"out": out, "max_logits": max_logits, "lse": lse}


def _sparse_decode(x: Values, parameters: Parameters) -> dict[str, Balls]:
    b, s, h, _ = x["q"].shape
    rows = x["kv_cache"].reshape(-1, x["kv_cache"].shape[-1])
    lengths = np.repeat(x["topk_length"], s) if "topk_length" in x else None
    q, indices = (x[name].reshape(b * s, *x[name].shape[2:]) for name in ("q", "indices"))
    out, _, lse = _sparse(q, rows, indices, lengths, x, parameters)
    return {"out": out.reshape(b, s, h, -1), "lse": lse.reshape(b, s, h).swapaxes(1, 2)}


def _sparse(
    q: Balls, rows: Balls, indices: NDArray[Any], lengths: NDArray[Any] | None, x: Values, parameters: Parameters
) -> tuple[Balls, Balls, Balls]:
    out, max_logits, lse = certified_sparse.sparse_attention(
        q,
        rows,
        indices,
        scale=certified.arb(parameters["softmax_scale"]),
        head_dim_v=parameters["head_dim_v"],
        attn_sink=x.get("attn_sink"),
        topk_length=lengths,
    )
    return out, max_logits, lse


def _project_indexer(x: Values, parameters: Parameters) -> dict[str, Balls]:
    operands = (x["hidden"], x["q_latent"], x["positions"], layer_weights(x), indexer_config_from(parameters["config"]))
    return dict(zip(("q", "k", "weights"), certified_sparse.project_indexer(*operands), strict=True))


def _prefill_backward(x: Values, parameters: Parameters) -> dict[str, Balls]:
    scale = certified.arb(parameters["softmax_scale"])
    found = certified_gradients.prefill_gradients(**x, scale=scale, causal=parameters["causal"])
    return dict(zip(("q_grad", "k_grad", "v_grad"), found, strict=True))


def _sparse_prefill_backward(x: Values, parameters: Parameters) -> dict[str, Balls]:
    q_grad, rows_grad = certified_gradients.sparse_prefill_gradients(
        x["q"],
        x["kv"][:, 0],
        x["indices"][:, 0],
        x["out_grad"],
        x["lse_grad"],
        scale=certified.arb(parameters["softmax_scale"]),
        head_dim_v=parameters["head_dim_v"],
        attn_sink=x["attn_sink"],
    )
    return {"q_grad": q_grad, "kv_grad": rows_grad[:, None]}


ENCLOSURES: dict[str, Callable[[Values, Parameters], dict[str, Balls]]] = {
    "rope_table": _rope_table,
    "rope": _rope,
    "absorb": _absorb,
    "absorption": _absorption,
    "rms_norm": _rms_norm,
    "layer": _layer,
    "prefill": _prefill,
    "decode": _decode,
    "ragged_decode": _ragged_decode,
    "rank_decode": _rank_decode,
    "merge": _merge,
    "partial_rope": _partial_rope,
    "decode_quantized": _decode_quantized,
    "sparse_prefill": _sparse_prefill,
    "sparse_decode": _sparse_decode,
    "project_indexer": _project_indexer,
    "prefill_backward": _prefill_backward,
    "sparse_prefill_backward": _sparse_prefill_backward,
}


def _bits(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    return {"out": exact.decode_bits(x["bits"], parameters["format"])}


def _round(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    return {"out": exact.round_to(x["x"], parameters["format"], parameters["overflow"])}


def _pack(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    none = np.zeros((len(x["codes"]), 0))
    stored = (x["codes"], x.get("scales", none), x.get("plain", none))
    return {"pages": exact.pack(*stored, parameters["layout"], parameters["page_size"])}


def _unpack(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    rows = exact.unpack(
        x["pages"], parameters["layout"], parameters["page_size"], parameters["tokens"], parameters["tensor_scale"]
    )
    return {"rows": rows}


def _write_cache(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    return {"out": exact.write_cache(x["latent"], x["k_pe"], x["kv_cache"], x["slot_mapping"])}


def _indexer(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    logits, indices = certified_sparse.select(**x, top_k=parameters["top_k"])
    return {"logits": logits, "indices": indices}


def _dequantize_weight(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    return {"out": exact.dequantize_weight(x["codes"], x["scales"], parameters["block_size"])}


def _shard_layer(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    weights, heads, ranks = layer_weights(x), parameters["config"]["num_heads"], parameters["ranks"]
    parts = (exact.shard_layer(weights, heads, ranks, rank) for rank in range(ranks))
    return {f"rank{rank}.{name}": part for rank, own in enumerate(parts) for name, part in own.items()}


def _gather_gradients(x: Values, parameters: Parameters) -> dict[str, NDArray[Any]]:
    prefixes = [f"rank{rank}." for rank in range(parameters["ranks"])]
    each_rank = [{name.removeprefix(each): g for name, g in x.items() if name.startswith(each)} for each in prefixes]
    gathered: dict[str, NDArray[Any]] = dict(exact.gather_gradients(each_rank))
    return gathered


RATIONAL: dict[str, Callable[[Values, Parameters], dict[str, NDArray[Any]]]] = {
    "bits": _bits,
    "round": _round,
    "pack": _pack,
    "unpack": _unpack,
    "write_cache": _write_cache,
    "indexer": _indexer,
    "dequantize_weight": _dequantize_weight,
    "shard_layer": _shard_layer,
    "gather_gradients": _gather_gradients,
}
"""Operations whose results are rational numbers, rounded once where float64 does not hold them, or bytes."""
