"""The results of a case, in ball arithmetic. Importing this module needs python-flint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mla_spec.golden import certified
from mla_spec.golden.generate import Values, config_from, layer_weights, rope_from
from mla_spec.reference.typing import Array


def expected(operation: str, inputs: Values, parameters: Mapping[str, Any]) -> dict[str, Array]:
    """The results by name, each element correctly rounded to float64."""
    return EXPECTED[operation](inputs, parameters)


def _rope_table(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    rope = rope_from(p["rope"])
    results = certified.rounded(lambda: [certified.rope_frequencies(rope), *certified.cos_sin(x["positions"], rope)])
    return dict(zip(("frequencies", "cos", "sin"), results, strict=True))


def _rope(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    rope = rope_from(p["rope"])
    return {"out": certified.rounded(lambda: [certified.rotate(x["x"], x["positions"], rope)])[0]}


def _absorb(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    config = config_from(p["config"])
    w_uk, w_uv = certified.rounded(lambda: certified.absorb(x["kv_b_proj"], config))
    return {"w_uk": w_uk, "w_uv": w_uv}


def _rms_norm(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    return {"out": certified.rounded(lambda: [certified.rms_norm(x["x"], x["weight"], p["eps"])])[0]}


def _layer(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    config, prompt = config_from(p["config"]), p["prompt"]
    (out,) = certified.rounded(lambda: [certified.layer(x["hidden"], x["positions"], layer_weights(x), config)])
    return {"prefill": out[:, :prompt], "decode": out[:, prompt:]}


def _prefill(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    scale, causal = certified.arb(p["softmax_scale"]), p["causal"]
    out, lse = certified.rounded(lambda: certified.prefill(**x, scale=scale, causal=causal))
    return {"out": out, "lse": lse}


def _decode(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    scale, rest = certified.arb(p["softmax_scale"]), {"head_dim_v": p["head_dim_v"], "causal": p["causal"]}
    out, lse = certified.rounded(lambda: certified.decode(**x, scale=scale, **rest))
    return {"out": out, "lse": lse}


def _merge(x: Values, p: Mapping[str, Any]) -> dict[str, Array]:
    out, lse = certified.rounded(lambda: certified.merge(x["outs"], x["lses"]))
    return {"out": out, "lse": lse}


EXPECTED: dict[str, Callable[[Values, Mapping[str, Any]], dict[str, Array]]] = {
    "rope_table": _rope_table,
    "rope": _rope,
    "absorb": _absorb,
    "rms_norm": _rms_norm,
    "layer": _layer,
    "prefill": _prefill,
    "decode": _decode,
    "merge": _merge,
}
