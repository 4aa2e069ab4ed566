"""The text of ``mla-spec embed``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.reference.embedding import (
    GroupedAttention,
    GroupedWeights,
    embed,
    embedded_layer,
    grouped_layer,
)
from mla_spec.reference.grouped_checkpoint import grouped_attention
from mla_spec.reference.mla import absorbed, explicit
from mla_spec.text.table import format_table

TOKENS, HIDDEN_SIZE, GROUPS = 5, 48, 4
"""Of the layer with random weights that is computed both ways: heads are as wide as the model's."""


def embed_report(source: str) -> str:
    """An existing model's attention as MLA, and how far the two are apart on random tokens.

    Args:
        source: path of a config.json, or of its folder.

    Raises:
        ValueError: see ``grouped_attention``.
    """
    name, dims = grouped_attention(source)
    g, d = dims.num_key_value_heads, dims.head_dim
    header = "", "heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "elements/token/layer"
    width = dims.kv_lora_rank + dims.qk_rope_head_dim
    ranks = dims.kv_lora_rank, dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.v_head_dim
    rows = [
        header,
        (dims.kind, str(dims.num_heads), "", "", "", str(dims.v_head_dim), str(g * (d + dims.v_head_dim))),
        ("MLA", str(dims.num_heads), *map(str, ranks), str(width)),
    ]
    return "\n".join(
        [
            f"{name}: {dims.kind} of {dims.num_heads} heads in {g} groups, {d} wide, of which {dims.rope_dim} are rotated",
            format_table(rows),
            f"softmax_scale is {d}^-1/2 = {dims.softmax_scale:.17g}, not (n + r)^-1/2",
            _frequencies(dims),
            _check(dims),
        ]
    )


def _frequencies(dims: GroupedAttention) -> str:
    if dims.num_key_value_heads == 1:
        return "the rotated key has the frequencies of a standard MLA layer of that width"
    return (
        f"the rotated key has each of the {dims.rope_dim // 2} frequencies {dims.num_key_value_heads} times: kernels that get "
        "rotated rows take it; a standard MLA layer, whose frequencies all differ, is no such layer"
    )


def _check(dims: GroupedAttention) -> str:
    """How far the layer and its embedding are apart, with random weights."""
    groups = min(dims.num_key_value_heads, GROUPS)
    heads = groups * (dims.num_heads // dims.num_key_value_heads)
    small = replace(dims, hidden_size=HIDDEN_SIZE, num_heads=heads, num_key_value_heads=groups)
    rng = np.random.default_rng(0)
    e, d, dv = HIDDEN_SIZE, dims.head_dim, dims.v_head_dim
    shapes = (heads * d, e), (groups * d, e), (groups * dv, e), (e, heads * dv)
    weights = GroupedWeights(*(rng.standard_normal(shape) / np.sqrt(shape[1]) for shape in shapes))
    hidden, positions = rng.standard_normal((TOKENS, e)), np.arange(TOKENS) + 4090
    want, embedded = grouped_layer(hidden, positions, weights, small), embed(weights, small)
    apart = {
        attend.__name__: float(np.abs(embedded_layer(hidden, positions, embedded, small, attend) - want).max())
        for attend in (explicit, absorbed)
    }
    what = f"{heads} heads in {groups} groups over {e} hidden dims, random weights, {TOKENS} tokens"
    largest = float(np.abs(want).max())
    differences = ", ".join(f"{size:.1e} ({form})" for form, size in apart.items())
    return f"computed both ways ({what}): outputs up to {largest:.3g} differ by at most {differences}"
