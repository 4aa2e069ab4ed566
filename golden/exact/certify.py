"""How far the float64 reference is from rigorous enclosures of the exact results. Importing this module needs python-flint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flint import ctx

from mla_spec.golden.cases.case import (
    Parameters,
    Values,
    config_from,
    indexer_config_from,
    layer_weights,
    rope_from,
)
from mla_spec.golden.corpus.computed import merge_as_attention
from mla_spec.golden.exact.balls import (
    FIRST_BITS,
    LAST_BITS,
    Balls,
    arb,
)
from mla_spec.golden.exact.expected import enclosures
from mla_spec.golden.exact.gauge import (
    Gauged,
    attend,
    concat,
    explicit,
    layer,
    layer_norm,
    product,
    rms_norm,
    rope,
)
from mla_spec.reference import mla
from mla_spec.reference.cache import gather_rows, paged_decode
from mla_spec.reference.indexer import project_indexer
from mla_spec.reference.merge import merge
from mla_spec.reference.rope import rope_cos_sin, rope_frequencies
from mla_spec.reference.typing import Array

LIMIT_ULPS = 4.0
"""What the reference promises of every element: so many ulps of its gauge at most."""


@dataclass(frozen=True)
class Certified:
    """One result of the reference and the largest distance of an element from its enclosure.

    Attributes:
        name: of the result; one that the reference computes in two forms occurs twice.
        elements: how many numbers were compared.
        ulps: the largest distance, in ulps of the element's gauge; inf where one is infinite or NaN and the other not.
        index: where that is.
    """

    name: str
    elements: int
    ulps: float
    index: tuple[int, ...]


def certify(operation: str, inputs: Values, parameters: Mapping[str, Any]) -> list[Certified]:
    """The reference's results of one case against their enclosures.

    Every distance is an upper bound: that of the farthest point of the ball. The precision is raised until the balls are
    small beside an ulp.
    """
    results = list(_RESULTS[operation](inputs, parameters))
    bits = FIRST_BITS
    while True:
        with ctx.workprec(bits):
            balls = enclosures(operation, inputs, parameters)
            distances = [_ulps(result, balls[name]) for name, result in results]
        if all(known.all() for _, known in distances) or bits >= LAST_BITS:
            return [_worst(name, ulps) for (name, _), (ulps, _) in zip(results, distances, strict=True)]
        bits *= 2


def _ulps(result: Gauged, balls: Balls) -> tuple[Array, Array]:
    """(ulps between value and ball at most, whether the ball is below 2^-20 ulp), elementwise."""
    if result.value.shape != balls.shape:
        raise ValueError(f"the reference gives {result.value.shape}, ball arithmetic {balls.shape}")
    ulp = np.spacing(result.gauge)
    ulps, known = np.empty(balls.shape), np.empty(balls.shape, dtype=bool)
    for index, ball in np.ndenumerate(balls):
        value = float(result.value[index])
        if not np.isfinite(value) or not ball.is_finite():
            ulps[index] = 0.0 if value == float(ball) else np.inf
            known[index] = ulps[index] == 0.0
            continue
        unit = arb(float(ulp[index]))
        ulps[index] = float((abs(ball - arb(value)) / unit).upper())
        known[index] = float((ball.rad() / unit).upper()) < 2.0**-20
    return ulps, known


def _worst(name: str, ulps: Array) -> Certified:
    if ulps.size == 0:
        return Certified(name, 0, 0.0, ())
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ulps)), ulps.shape))
    return Certified(name, ulps.size, float(ulps[index]), index)


# The reference's results and their gauges


def _rope_table(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    config, positions = rope_from(parameters["rope"]), x["positions"]
    yield "frequencies", Gauged.of(rope_frequencies(config))
    for name, table in zip(("cos", "sin"), rope_cos_sin(positions, config), strict=True):
        yield name, Gauged(table, np.ones_like(table))


def _rope(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    yield "out", rope(Gauged.of(x["x"]), x["positions"], rope_from(parameters["rope"]))


def _absorb(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    for name, rows in zip(("w_uk", "w_uv"), mla.absorb(x["kv_b_proj"], config_from(parameters["config"])), strict=True):
        yield name, Gauged.of(rows)


def _absorption(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    w_uk, w_uv = mla.absorb(x["kv_b_proj"], config_from(parameters["config"]))
    q = Gauged.of(np.concatenate([x["q_nope"], x["q_pe"]], axis=-1))
    scale = parameters["softmax_scale"]
    gauged, _ = explicit(q, Gauged.of(x["latent"]), Gauged.of(x["k_pe"]), w_uk, w_uv, softmax_scale=scale)
    for form in (mla.explicit, mla.absorbed):
        out, _ = form(x["q_nope"], x["q_pe"], x["latent"], x["k_pe"], w_uk, w_uv, softmax_scale=scale)
        yield "out", Gauged(out, gauged.gauge)


def _rms_norm(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    yield "out", rms_norm(Gauged.of(x["x"]), x["weight"], parameters["eps"])


def _layer(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    config, weights, prompt = config_from(parameters["config"]), layer_weights(x), parameters["prompt"]
    hidden, positions = x["hidden"], x["positions"]
    gauge = layer(hidden, positions, weights, config).gauge
    for form in (mla.explicit, mla.absorbed):
        start, later = slice(prompt), slice(prompt, None)
        out, cache = mla.layer(hidden[:, start], positions[:, start], weights, config, attend=form)
        yield "prefill", Gauged(out, gauge[:, start])
        out, _ = mla.layer(hidden[:, later], positions[:, later], weights, config, cache=cache, attend=form)
        yield "decode", Gauged(out, gauge[:, later])


def _prefill(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    parts = []
    for i in range(len(x["cu_seqlens_q"]) - 1):
        queries, keys = slice(*x["cu_seqlens_q"][i : i + 2]), slice(*x["cu_seqlens_k"][i : i + 2])
        operands = (Gauged.of(a) for a in (x["q"][queries], x["k"][keys], x["v"][keys]))
        options = {"window": parameters.get("window"), "attn_sink": x.get("attn_sink")}
        parts.append(
            attend(*operands, softmax_scale=parameters["softmax_scale"], causal=parameters["causal"], **options)
        )
    for name, axis, results in zip(("out", "lse"), (0, 1), zip(*parts, strict=True), strict=True):
        fields = ([getattr(result, field) for result in results] for field in ("value", "gauge"))
        yield name, Gauged(*(np.concatenate(arrays, axis=axis) for arrays in fields))


def _decode(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    scale, causal, width = parameters["softmax_scale"], parameters["causal"], parameters["head_dim_v"]
    lengths = x["cache_seqlens"]
    rows = gather_rows(x["kv_cache"], x["block_table"], lengths)[:, :, None]  # [b, t, 1, c+r]
    operands = (Gauged.of(a) for a in (x["q"], rows, rows[..., :width]))
    window = parameters.get("window")
    gauged = attend(
        *operands,
        softmax_scale=scale,
        cache_seqlens=lengths,
        causal=causal,
        window=window,
        attn_sink=x.get("attn_sink"),
    )
    results = paged_decode(**x, head_dim_v=width, softmax_scale=scale, causal=causal, window=window)
    for name, value, result in zip(("out", "lse"), results, gauged, strict=True):
        yield name, Gauged(value, result.gauge)


def _merge(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    q, k, v, present = (Gauged.of(a) for a in merge_as_attention(x["outs"], x["lses"]))
    gauged_out, gauged_lse = attend(q, k, v, softmax_scale=1.0, cache_seqlens=present.value, causal=False)
    out, lse = merge(x["outs"], x["lses"])
    yield "out", Gauged(out, gauged_out.gauge[..., 0, 0, :])
    yield "lse", Gauged(lse, np.swapaxes(gauged_lse.gauge[..., 0, 0], 1, 2))


def _project_indexer(x: Values, parameters: Parameters) -> Iterator[tuple[str, Gauged]]:
    config, weights = indexer_config_from(parameters["config"]), layer_weights(x)
    hidden, r = Gauged.of(x["hidden"]), config.rope_dim
    q = product("oc,...c->...o", weights["wq_b"], Gauged.of(x["q_latent"]))
    q = q.reshape(len(x["hidden"]), config.index_n_heads, config.index_head_dim)
    k = product("oe,...e->...o", weights["wk"], hidden)
    k = layer_norm(k, weights["k_norm.weight"], weights["k_norm.bias"], config.k_norm_eps)
    q, k = (concat(rope(y[..., :r], x["positions"], config.rope), y[..., r:]) for y in (q, k))
    heads = product("oe,...e->...o", config.weight_scale * weights["weights_proj"], hidden)
    values = project_indexer(x["hidden"], x["q_latent"], x["positions"], weights, config)
    for name, value, gauged in zip(("q", "k", "weights"), values, (q, k, heads), strict=True):
        yield name, Gauged(value, gauged.gauge)


_RESULTS: dict[str, Callable[[Values, Parameters], Iterator[tuple[str, Gauged]]]] = {
    "rope_table": _rope_table,
    "rope": _rope,
    "absorb": _absorb,
    "absorption": _absorption,
    "rms_norm": _rms_norm,
    "layer": _layer,
    "prefill": _prefill,
    "decode": _decode,
    "merge": _merge,
    "project_indexer": _project_indexer,
}
"""Operations that are certified. The others of the corpus are made of these: attention over rows that are gathered,
dequantised or selected, and rotation of a part."""
