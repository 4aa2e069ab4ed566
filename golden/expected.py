"""The results of a case, in ball or rational arithmetic. Importing this module needs python-flint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.golden import certified, exact
from mla_spec.golden.case import Values, config_from, layer_weights, rope_from
from mla_spec.golden.certified import Balls


def expected(operation: str, inputs: Values, parameters: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The results by name: floating-point ones correctly rounded to float64, bytes as uint8."""
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


def _rope_table(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    rope = rope_from(p["rope"])
    cos, sin = certified.cos_sin(x["positions"], rope)
    return {"frequencies": certified.rope_frequencies(rope), "cos": cos, "sin": sin}


def _rope(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    return {"out": certified.rotate(x["x"], x["positions"], rope_from(p["rope"]))}


def _absorb(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    w_uk, w_uv = certified.absorb(x["kv_b_proj"], config_from(p["config"]))
    return {"w_uk": w_uk, "w_uv": w_uv}


def _absorption(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    """Attention of each sequence to its latents, from the explicit form."""
    w_uk, w_uv = certified.absorb(x["kv_b_proj"], config_from(p["config"]))
    operands = zip(*(certified.ball(x[name]) for name in ("q_nope", "q_pe", "latent", "k_pe")), strict=True)
    scale = certified.arb(p["softmax_scale"])
    return {"out": np.stack([certified.explicit(*each, w_uk, w_uv, scale) for each in operands])}


def _rms_norm(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    return {"out": certified.rms_norm(x["x"], x["weight"], p["eps"])}


def _layer(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    prompt = p["prompt"]
    out = certified.layer(x["hidden"], x["positions"], layer_weights(x), config_from(p["config"]))
    return {"prefill": out[:, :prompt], "decode": out[:, prompt:]}


def _prefill(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    out, lse = certified.prefill(**x, scale=certified.arb(p["softmax_scale"]), causal=p["causal"])
    return {"out": out, "lse": lse}


def _decode(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    scale = certified.arb(p["softmax_scale"])
    out, lse = certified.decode(**x, head_dim_v=p["head_dim_v"], scale=scale, causal=p["causal"])
    return {"out": out, "lse": lse}


def _merge(x: Values, p: Mapping[str, Any]) -> dict[str, Balls]:
    out, lse = certified.merge(x["outs"], x["lses"])
    return {"out": out, "lse": lse}


ENCLOSURES: dict[str, Callable[[Values, Mapping[str, Any]], dict[str, Balls]]] = {
    "rope_table": _rope_table,
    "rope": _rope,
    "absorb": _absorb,
    "absorption": _absorption,
    "rms_norm": _rms_norm,
    "layer": _layer,
    "prefill": _prefill,
    "decode": _decode,
    "merge": _merge,
}


def _bits(x: Values, p: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {"out": exact.decode_bits(x["bits"], p["format"])}


def _round(x: Values, p: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {"out": exact.round_to(x["x"], p["format"], p["overflow"])}


def _pack(x: Values, p: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    none = np.zeros((len(x["codes"]), 0))
    stored = (x["codes"], x.get("scales", none), x.get("plain", none))
    return {"pages": exact.pack(*stored, p["layout"], p["page_size"])}


def _unpack(x: Values, p: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    rows = exact.unpack(x["pages"], p["layout"], p["page_size"], p["tokens"], p["tensor_scale"])
    return {"rows": rows}


RATIONAL: dict[str, Callable[[Values, Mapping[str, Any]], dict[str, NDArray[Any]]]] = {
    "bits": _bits,
    "round": _round,
    "pack": _pack,
    "unpack": _unpack,
}
"""Operations whose results are rational numbers that float64 holds, or bytes."""
