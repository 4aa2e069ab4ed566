"""The attention of an existing model, MHA, GQA or MQA, from its configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_spec.reference.checkpoint import Source, read_config
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.embedding import GroupedAttention


def grouped_attention(source: Source) -> tuple[str, GroupedAttention]:
    """(its name, dimensions) of a config.json with transformers' names.

    num_key_value_heads is num_attention_heads where it is not stated, and head_dim hidden_size / num_attention_heads. Of the
    rotary embedding only what the embedding depends on is read: how many dims it rotates, and rope_theta. Frequencies may be
    scaled in any way, since a group's keys keep their own.

    Raises:
        ValueError: unreadable, MLA already, or a dimension that is not stated or no positive integer.
    """
    name, config = read_config(source)
    if config.get("kv_lora_rank") is not None:
        raise ValueError(f"{name}: kv_lora_rank is stated, so that attention is MLA already")
    hidden, heads = (_required(name, config, key) for key in ("hidden_size", "num_attention_heads"))
    head_dim = config.get("head_dim") or hidden // heads
    try:
        return name, GroupedAttention(
            hidden_size=hidden,
            num_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            v_head_dim=config.get("v_head_dim") or head_dim,
            rope=_rope(config, head_dim),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _required(name: str, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: {key} must be a positive integer, got {value!r}")
    return value


def _rope(config: dict[str, Any], head_dim: int) -> RopeConfig:
    entry = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"rope_scaling: expected a JSON object, got {entry!r}")
    theta = entry.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ValueError("rope_theta is not stated; expected a model with a rotary embedding")
    factor = entry.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    dim = int(head_dim * factor)
    return RopeConfig(dim=dim, theta=float(theta), interleaved=False)
