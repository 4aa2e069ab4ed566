"""Faults of layers whose weights change: what was made from the old ones lives on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.adapters.pytorch_layer import TorchLayer
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig

COPIED = replace(TorchAbsorbed.supports, layer_weights="copied")
OVERWRITTEN = "test_layer_uses_weights_overwritten_in_place"
MADE_AGAIN = "test_layer_made_again_uses_its_own_weights"


@planted(
    "C30",
    source=(
        "https://github.com/vllm-project/vllm/issues/48312",
        "https://github.com/THUDM/slime/pull/960",
    ),
    symptom="an engine that is sent new weights decodes with the absorbed ones of step 0",
    shows_when="weights are overwritten after the layer was made",
    killed_by=(OVERWRITTEN,),
)
class AbsorbedWhenMade(TorchAbsorbed):
    """Absorbed weights are copies, made with the layer."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        made = super().layer(weights, config)
        made.w_uk, made.w_uv = made.w_uk.clone(), made.w_uv.clone()
        return made


class _AbsorbsByVersion(TorchLayer):
    version = -1

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        weight = self.weights["kv_b_proj"]
        if weight._version != self.version:
            self.version = weight._version
            w_uk, w_uv = self.subject.absorb(weight, config=self.config)
            self.w_uk, self.w_uv = w_uk.clone(), w_uv.clone()
        return super().forward(hidden, positions)


@planted(
    "C31",
    source=("https://github.com/vllm-project/vllm/issues/48974",),
    symptom="weights that arrive by a copy between devices have no effect on what was derived from them",
    shows_when="weights are overwritten behind autograd's count of versions",
    killed_by=(OVERWRITTEN,),
)
class AbsorbedByVersion(TorchAbsorbed):
    """Absorbed weights are made again when autograd has counted a change."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _AbsorbsByVersion(self, weights, config)


@planted(
    "C32",
    source=("https://github.com/sgl-project/sglang/pull/25001",),
    symptom="a model that is loaded after another decodes with the other's absorbed weights",
    shows_when="the weights of a new layer lie where those of an old one lay",
    killed_by=(MADE_AGAIN,),
)
class AbsorbedByAddress(TorchAbsorbed):
    """Absorbed weights are kept by the address of the weight they were made from."""

    supports = COPIED

    def __init__(self) -> None:
        self.absorbed: dict[Any, tuple[Tensor, Tensor]] = {}

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        made = super().layer(weights, config)
        weight = weights["kv_b_proj"]
        key = weight.data_ptr(), weight.shape, config
        made.w_uk, made.w_uv = self.absorbed.setdefault(key, (made.w_uk.clone(), made.w_uv.clone()))
        return made


@planted(
    "X-absorbed-by-identity",
    symptom="now and then a reloaded model decodes with the weights of the one before",
    shows_when="a tensor of the new weights is the Python object that an old one was",
    killed_by=(MADE_AGAIN,),
)
class AbsorbedByIdentity(TorchAbsorbed):
    """Absorbed weights are kept by ``id`` of the weight they were made from, which may be gone."""

    supports = COPIED

    def __init__(self) -> None:
        self.absorbed: dict[Any, tuple[Tensor, Tensor]] = {}

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        made = super().layer(weights, config)
        key = id(weights["kv_b_proj"]), config
        made.w_uk, made.w_uv = self.absorbed.setdefault(key, (made.w_uk.clone(), made.w_uv.clone()))
        return made


@planted(
    "X-fused-projection-of-step-0",
    symptom="policy and engine drift apart as training goes on",
    shows_when="weights are overwritten after the layer was made",
    killed_by=(OVERWRITTEN,),
)
class FusedProjectionOfStep0(TorchAbsorbed):
    """The down-projections are copied into one matrix when the layer is made, and only the other weights stay live."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        fused = ("q_a_proj", "kv_a_proj_with_mqa")
        return super().layer({name: w.clone() if name in fused else w for name, w in weights.items()}, config)
