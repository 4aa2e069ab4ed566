"""Faults of the layer around attention: how weights are laid out for it, and how cached positions are moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchLayer, wide
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig, RopeConfig

PREFILL, DECODE = "test_layer_prefill_agrees_with_reference", "test_layer_decode_agrees_with_reference"


@planted(
    "B25",
    source=(
        "https://github.com/ggml-org/llama.cpp/pull/8501",
        "https://github.com/ggml-org/llama.cpp/issues/8498",
    ),
    symptom="garbage after the context was shifted",
    shows_when="cached positions were moved",
    killed_by=("test_layer_prefill_agrees_with_reference", "test_layer_decode_agrees_with_reference"),
)
class ShiftRotatesLatent(TorchAbsorbed):
    """Rows are moved to where the sequence starts by rotating all of them, the latent too."""

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        latent, k_pe = super().project_latent(hidden, positions, weights, config)
        if config.rope is None:
            return latent, k_pe
        width = latent.shape[-1] // 2 * 2
        whole = RopeConfig(dim=width, theta=config.rope.theta, interleaved=config.rope.interleaved)
        shift = positions[:, :1].expand_as(positions)
        return torch.cat([self.rope(latent[..., :width], shift, rope=whole), latent[..., width:]], dim=-1), k_pe


class _Relaid(TorchLayer):
    """Its rope dimensions have another order than the checkpoint's, in which stages are handed out."""

    trace = None


class RelaidWeights(TorchAbsorbed):
    """Correct: rope rows of the weights are put in the order of the half layout, which is then used."""

    name = "torch-relaid"
    supports = replace(TorchAbsorbed.supports, layer_weights="copied")

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        if config.rope is None or not config.rope.interleaved:
            return super().layer(weights, config)
        (q_name,) = {"q_proj", "q_b_proj", "q_gate_proj"} & set(weights)
        kv_name, n, r = "kv_a_proj_with_mqa", config.qk_nope_head_dim, config.qk_rope_head_dim
        q = weights[q_name].unflatten(0, (config.num_heads, -1))  # [h, n+r, ·], or with the rows of gates
        q_nope, q_pe, gates = q.split([n, r, q.shape[1] - n - r], dim=1)
        latent, k_pe = weights[kv_name].split([config.kv_lora_rank, config.qk_rope_head_dim])
        relaid = {
            q_name: torch.cat([q_nope, self.relayout(q_pe.transpose(0, 1)).transpose(0, 1), gates], dim=1).flatten(
                0, 1
            ),
            kv_name: torch.cat([latent, self.relayout_keys(k_pe)]),
        }
        if config.k_pe_norm:
            relaid["k_rope_only_layernorm"] = self.relayout(weights["k_rope_only_layernorm"])
        return _Relaid(self, {**weights, **relaid}, replace(config, rope=replace(config.rope, interleaved=False)))

    def relayout(self, rows: Tensor) -> Tensor:
        """Rows 0, 2, 4, ... and then 1, 3, 5, ..."""
        return torch.cat([rows[0::2], rows[1::2]])

    def relayout_keys(self, rows: Tensor) -> Tensor:
        """Rows [r, e] of kv_a_proj_with_mqa."""
        return self.relayout(rows)


@planted(
    "B26",
    source=(
        "https://github.com/vllm-project/vllm-ascend/pull/3850",
        "https://github.com/vllm-project/vllm-ascend/commit/dc960e798e",
    ),
    symptom="accuracy of a fused prologue",
    shows_when="interleaved rope and weights that are laid out anew",
    killed_by=("test_layer_prefill_agrees_with_reference", "test_layer_decode_agrees_with_reference"),
)
class RelaysOutOtherAxis(RelaidWeights):
    """The axis of the hidden size is put in another order instead of the rows."""

    def relayout_keys(self, rows: Tensor) -> Tensor:
        return self.relayout(rows.T).T


@planted(
    "C12",
    source=("https://github.com/vllm-project/vllm/pull/48986",),
    symptom="an adapter on kv_b_proj has no effect in the absorbed path",
    shows_when="a second layer of the same shapes has other weights",
    killed_by=("test_layers_are_independent",),
)
class AbsorbedOnce(TorchAbsorbed):
    """Absorbed weights were computed from the base model's; those with which an adapter was merged are not looked at."""

    def __init__(self) -> None:
        self.absorbed: dict[MLAConfig, tuple[Tensor, Tensor]] = {}

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        made = super().layer(weights, config)
        made.w_uk, made.w_uv = self.absorbed.setdefault(config, (made.w_uk, made.w_uv))
        return made


@planted(
    "X-gate-left-out",
    symptom="a gated model is wrong in every layer of attention",
    shows_when="the layer has an output gate",
    killed_by=(PREFILL, DECODE),
)
class GateLeftOut(TorchAbsorbed):
    """Weights of the gate are loaded and not used."""

    def gated(self, out: Tensor, hidden: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        return out


@planted(
    "X-gates-by-element-and-head",
    symptom="another model than the one that was trained",
    shows_when="the layer has a gate of each element, and several heads",
    killed_by=(PREFILL, DECODE),
)
class GatesByElementAndHead(TorchAbsorbed):
    """Gates are laid out [v, h], as if the heads were innermost."""

    def gated(self, out: Tensor, hidden: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        gate = self.gate(self.linear(hidden, weights["g_proj"])).unflatten(-1, (-1, config.num_heads))
        return self.scaled(out, gate.transpose(-1, -2))


@planted(
    "X-gate-of-silu",
    symptom="another model than the one that was trained",
    shows_when="the layer has an output gate",
    killed_by=(PREFILL, DECODE),
)
class GateOfSilu(TorchExplicit):
    """The activation of the MLP's gate is used."""

    def gate(self, g: Tensor) -> Tensor:
        return torch.nn.functional.silu(g.to(wide(g.dtype)))


@planted(
    "X-gate-of-the-last-token",
    symptom="prefill is wrong, decode is right",
    shows_when="a call of several tokens, and an output gate",
    killed_by=(PREFILL,),
)
class GateOfTheLastToken(TorchAbsorbed):
    """All tokens of a call have the gate of its last one, as if there were one."""

    def gated(self, out: Tensor, hidden: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        return super().gated(out, hidden[:, -1:], weights, config)


@planted(
    "X-query-gate-of-the-normed-latent",
    symptom="a model whose gates come with its queries is wrong in every layer of attention",
    shows_when="queries and gates come from one projection",
    killed_by=(PREFILL, DECODE),
)
class QueryGateOfTheNormedLatent(TorchAbsorbed):
    """The projection takes the query latent after its norm twice."""

    def query_latent(self, hidden: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        latent = super().query_latent(hidden, weights, config)
        return latent if config.output_gate != "query" else latent[..., : config.q_lora_rank].repeat(1, 1, 2)


@planted(
    "X-query-gate-rows-of-all-heads",
    symptom="right with one head on each rank, and nonsense with several",
    shows_when="queries and gates come from one projection, of several heads",
    killed_by=(PREFILL, DECODE),
)
class QueryGateRowsOfAllHeads(TorchExplicit):
    """The rows of all heads' queries are taken to come before those of all gates."""

    def query_and_gate(self, weights: Mapping[str, Tensor], config: MLAConfig) -> tuple[Tensor, Tensor]:
        both = weights["q_gate_proj"]
        return both[: config.num_heads * config.qk_head_dim], both[config.num_heads * config.qk_head_dim :]


@planted(
    "X-layer-sink-left-out",
    symptom="a model with sinks is wrong in every layer of attention",
    shows_when="the layer has a sink",
    killed_by=(PREFILL, DECODE),
)
class LayerSinkLeftOut(TorchExplicit):
    """The layer does not pass its sinks to attention."""

    def attend_latent(self, *arguments: Any) -> Tensor:
        return super().attend_latent(*arguments[:7])
