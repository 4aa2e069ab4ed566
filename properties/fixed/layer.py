"""Fixed cases of ``layer`` that a quick check begins with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.layer import LayerCase, layer_models
from mla_spec.properties.strategies.layer import rotating_layer, supported_models
from mla_spec.subjects.supports import Supports


def elementary(supports: Supports, profile: Profile) -> list[LayerCase]:
    """A small layer, and two of the published models whose options the subject has."""
    (base,) = rotating_layer(supports, profile)
    models = [name for name in ("deepseek-v3", "deepseek-v2-lite") if name in supported_models(supports)]
    return [base, *(replace(base, model=name, **_of_model(name)) for name in models)]


def _of_model(name: str) -> dict[str, Any]:
    """Query compression as the model has it, and enough rotated pairs for its scaling to show."""
    compressed = layer_models()[name].fields["q_lora_rank"] is not None
    return {"q_lora_rank": 5 if compressed else None, "qk_rope_head_dim": 8}
