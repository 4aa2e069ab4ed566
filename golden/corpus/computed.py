"""What the float64 reference computes from a case, and how far it may be from exact by its own account."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.context_parallel import rank_decode_with_bound
from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.ragged import ragged_decode_with_bound
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.golden.cases.case import (
    Parameters,
    Values,
    config_from,
    layer_weights,
    rope_from,
)
from mla_spec.reference.cache import gather_rows, paged_decode
from mla_spec.reference.cache_layout import QuantisedRows, layout_of, pack, unpack
from mla_spec.reference.context_parallel import rank_decode
from mla_spec.reference.formats import decode_bits, format_of, round_to
from mla_spec.reference.merge import merge
from mla_spec.reference.mla import absorb, absorbed, explicit, layer, rms_norm
from mla_spec.reference.quantised_cache import dequantise
from mla_spec.reference.ragged import ragged_decode
from mla_spec.reference.rope import rope_cos_sin, rope_frequencies
from mla_spec.reference.typing import Array, IntArray

OWN = "the reference's own float64"
"""The name of the reference's own term in its bounds."""

SINK = "attention sink"
"""The name of the term of a sink, which in float64 counts the reference's roundings too."""

PROFILE = Profile.default("float64")
_FORMAT = format_of("float64")


@dataclass(frozen=True)
class Computed:
    """One result of the reference: which expected array it stands for, its value and how far it may be from exact."""

    name: str
    value: Array
    error: Array


def _rope_table(x: Values, parameters: Parameters) -> Iterator[Computed]:
    rope, positions = rope_from(parameters["rope"]), x["positions"]
    frequencies = rope_frequencies(rope)
    yield Computed("frequencies", frequencies, np.zeros_like(frequencies))  # promised to be correctly rounded
    cos, sin = rope_cos_sin(positions, rope)
    unit = np.zeros((*positions.shape, rope.dim))  # (1, 0) rotated is (cos, sin)
    unit[..., 0 :: 2 if rope.interleaved else 1][..., : rope.dim // 2] = 1.0
    _, bound = rope_with_bound(unit, positions, rope, PROFILE.rope, output="float64")
    error = bound.terms[OWN][..., :1] / rope.cos_sin_factor
    yield Computed("cos", cos, np.broadcast_to(error, cos.shape))
    yield Computed("sin", sin, np.broadcast_to(error, sin.shape))


def _rope(x: Values, parameters: Parameters) -> Iterator[Computed]:
    out, bound = rope_with_bound(x["x"], x["positions"], rope_from(parameters["rope"]), PROFILE.rope, output="float64")
    yield Computed("out", out, bound.terms[OWN])


def _absorb(x: Values, parameters: Parameters) -> Iterator[Computed]:
    for name, rows in zip(("w_uk", "w_uv"), absorb(x["kv_b_proj"], config_from(parameters["config"])), strict=True):
        yield Computed(name, rows, np.zeros_like(rows))


def _rms_norm(x: Values, parameters: Parameters) -> Iterator[Computed]:
    out = rms_norm(x["x"], x["weight"], parameters["eps"])
    # A sum of n squares, all positive, then eight roundings at most, as in layer_bound.
    yield Computed("out", out, gamma(x["x"].shape[-1] + 8, _FORMAT.unit_roundoff) * np.abs(out))


def _layer(x: Values, parameters: Parameters) -> Iterator[Computed]:
    config, weights, prompt = config_from(parameters["config"]), layer_weights(x), parameters["prompt"]
    hidden, positions = x["hidden"], x["positions"]
    for form, attend in (("explicit", explicit), ("absorbed", absorbed)):
        profile = Profile.default("float64", form=form)
        _, bound = layer_with_bound(hidden, positions, weights, config, profile)
        out, cache = layer(hidden[:, :prompt], positions[:, :prompt], weights, config, attend=attend)
        yield Computed("prefill", out, bound.total[:, :prompt])
        steps = []
        for i in range(prompt, hidden.shape[1]):
            one = slice(i, i + 1)
            out, cache = layer(hidden[:, one], positions[:, one], weights, config, cache=cache, attend=attend)
            steps.append(out)
        yield Computed("decode", np.concatenate(steps, axis=1), bound.total[:, prompt:])


def _prefill(x: Values, parameters: Parameters) -> Iterator[Computed]:
    parts = []
    for i in range(len(x["cu_seqlens_q"]) - 1):
        queries, keys = slice(*x["cu_seqlens_q"][i : i + 2]), slice(*x["cu_seqlens_k"][i : i + 2])
        parts.append(
            attention_with_bound(
                x["q"][queries],
                x["k"][keys],
                x["v"][keys],
                softmax_scale=parameters["softmax_scale"],
                causal=parameters["causal"],
                window=parameters.get("window"),
                attn_sink=x.get("attn_sink"),
                profile=PROFILE,
            )
        )
    out = np.concatenate([part.out for part in parts])
    yield Computed(
        "out", out, np.concatenate([part.out_error.terms[OWN] + part.out_error.terms[SINK] for part in parts])
    )
    lse = np.concatenate([part.lse for part in parts], axis=1)
    yield Computed("lse", lse, np.concatenate([part.lse_error.terms[OWN] for part in parts], axis=1))


def _decode(x: Values, parameters: Parameters) -> Iterator[Computed]:
    scale, causal, width = parameters["softmax_scale"], parameters["causal"], parameters["head_dim_v"]
    rows = gather_rows(x["kv_cache"], x["block_table"], x["cache_seqlens"])[:, :, None]  # [b, t, 1, c+r]
    bounded = attention_with_bound(
        x["q"],
        rows,
        rows[..., :width],
        softmax_scale=scale,
        cache_seqlens=x["cache_seqlens"],
        causal=causal,
        window=parameters.get("window"),
        attn_sink=x.get("attn_sink"),
        profile=PROFILE,
    )
    out, lse = paged_decode(**x, head_dim_v=width, softmax_scale=scale, causal=causal, window=parameters.get("window"))
    yield Computed("out", out, bounded.out_error.terms[OWN] + bounded.out_error.terms[SINK])
    yield Computed("lse", lse, bounded.lse_error.terms[OWN])


def _ragged_decode(x: Values, parameters: Parameters) -> Iterator[Computed]:
    options = {name: parameters[name] for name in ("softmax_scale", "head_dim_v", "causal")}
    bounded = ragged_decode_with_bound(**x, **options, profile=PROFILE)
    out, lse = ragged_decode(**x, **options)
    yield Computed("out", out, bounded.out_error.terms[OWN])
    yield Computed("lse", lse, bounded.lse_error.terms[OWN])


def _rank_decode(x: Values, parameters: Parameters) -> Iterator[Computed]:
    bounded = rank_decode_with_bound(**x, **parameters, profile=PROFILE)
    out, lse = rank_decode(**x, **parameters)
    yield Computed("out", out, bounded.out_error.terms[OWN])
    yield Computed("lse", lse, bounded.lse_error.terms[OWN])


def merge_as_attention(outs: Array, lses: Array) -> tuple[Array, Array, Array, IntArray]:
    """Operands (q, k, v, cache_seqlens) of the attention that a merge is: its keys are the parts, their scores the LSEs.

    Args:
        outs, lses: [parts, b, s, h, v] and [parts, b, h, s].

    Returns:
        q [b, s, h, 1, 1, 1], k [b, s, h, parts, 1, 1], v [b, s, h, parts, 1, v] and the number of parts with keys
        [b, s, h]; those without come last.
    """
    scores = np.moveaxis(lses, 0, -1).swapaxes(1, 2)  # [b, s, h, parts]
    values = np.moveaxis(outs, 0, -2)  # [b, s, h, parts, v]
    order = np.argsort(np.isneginf(scores), axis=-1, kind="stable")
    present: IntArray = np.isfinite(scores).sum(axis=-1)  # [b, s, h]
    scores = np.nan_to_num(np.take_along_axis(scores, order, axis=-1), neginf=0.0)
    values = np.take_along_axis(values, order[..., None], axis=-2)
    return np.ones((*present.shape, 1, 1, 1)), scores[..., None, None], values[..., None, :], present


def _merge(x: Values, parameters: Parameters) -> Iterator[Computed]:
    q, k, v, present = merge_as_attention(x["outs"], x["lses"])
    bounded = attention_with_bound(q, k, v, softmax_scale=1.0, cache_seqlens=present, causal=False, profile=PROFILE)
    merged_out, merged_lse = merge(x["outs"], x["lses"])
    yield Computed("out", merged_out, bounded.out_error.terms[OWN][..., 0, 0, :])
    yield Computed("lse", merged_lse, np.swapaxes(bounded.lse_error.terms[OWN][..., 0, 0], 1, 2))


def exactly(name: str, value: Array) -> Iterator[Computed]:
    yield Computed(name, value, np.zeros(value.shape))


def _bits(x: Values, parameters: Parameters) -> Iterator[Computed]:
    return exactly("out", decode_bits(x["bits"], parameters["format"]))


def _round(x: Values, parameters: Parameters) -> Iterator[Computed]:
    return exactly("out", round_to(x["x"], parameters["format"], overflow=parameters["overflow"]))


def _pack(x: Values, parameters: Parameters) -> Iterator[Computed]:
    layout = layout_of(parameters["layout"])
    none = np.zeros((len(x["codes"]), 0))
    stored = QuantisedRows(decode_bits(x["codes"], layout.code), x.get("scales", none), x.get("plain", none))
    return exactly("pages", pack(stored, layout, parameters["page_size"]).astype(np.float64))


def _unpack(x: Values, parameters: Parameters) -> Iterator[Computed]:
    layout = layout_of(parameters["layout"])
    stored = unpack(
        x["pages"].astype(np.uint8), layout, parameters["page_size"], tensor_scale=parameters["tensor_scale"]
    )
    return exactly("rows", dequantise(stored, layout).reshape(-1, layout.width)[: parameters["tokens"]])


COMPUTED: dict[str, Callable[[Values, Parameters], Iterator[Computed]]] = {
    "rope_table": _rope_table,
    "rope": _rope,
    "absorb": _absorb,
    "rms_norm": _rms_norm,
    "layer": _layer,
    "prefill": _prefill,
    "decode": _decode,
    "ragged_decode": _ragged_decode,
    "rank_decode": _rank_decode,
    "merge": _merge,
    "bits": _bits,
    "round": _round,
    "pack": _pack,
    "unpack": _unpack,
}
