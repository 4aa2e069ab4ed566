"""Cases of the gradients of ``layer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mla_spec.operations.gradients import BackwardDriver, Gradients, Tensors
from mla_spec.operations.layer import LayerCase, LayerInputs, make_layer
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Driver

_LEAK = 1 / 16
"""What a carrier weighs where another channel is meant, and another channel where the carrier is."""


@dataclass(frozen=True)
class LayerGradientInputs:
    """A layer with its tokens, and the gradient of its output; values exactly representable in the dtype."""

    layer: LayerInputs
    out_grad: Array  # [b, s, e]


@dataclass(frozen=True, kw_only=True)
class LayerGradientCase(LayerCase):
    """A layer, a prompt, and the gradient that arrives at its output.

    With ``weights`` "dense" all are Gaussian. With "aligned" terms of one sum have one sign wherever that can be had, so that
    a worst-case bound in 16-bit formats still means something. Softmax and RMSNorm subtract means on the way back, which
    therefore stay small:

    - Channel 0 of tokens and latents is a carrier: it sets the rms, and is hardly read. What RMSNorm takes away from a
      gradient points along the carrier.
    - The first token of a sequence is loud: its carrier is smaller, and so its keys and values are several times the
      others'. The mean that softmax subtracts is then far from all of them.
    - Little gradient arrives at the first token, whose only key gets all its weight: what its scores get is 0, and the error
      would show beside the others' sums.
    """

    kind = "layer_gradient"

    def build_gradient(self) -> LayerGradientInputs:
        """The inputs with the gradient of the output."""
        inputs = self.build()
        rng = np.random.default_rng([self.seed, sum(self.kind.encode()), 1])
        shape = inputs.hidden.shape
        if self.weights == "dense":
            return LayerGradientInputs(inputs, round_to(rng.standard_normal(shape), self.dtype))
        hidden, out_grad = rng.uniform(0.5, 1.0, shape), rng.uniform(0.25, 2.0, shape)
        hidden[:, 1:] /= 4
        hidden[..., 0] = 4.0
        hidden[:, 0, 0] = 2.0
        out_grad[:, 0] /= 64
        hidden, out_grad = (round_to(x, self.dtype) for x in (hidden * self.hidden_scale, out_grad))
        return LayerGradientInputs(replace(inputs, hidden=hidden), out_grad)

    def _aligned(self, rng: np.random.Generator, config: MLAConfig) -> dict[str, Array]:
        weights = {}
        for name, shape in weight_shapes(config).items():
            if name.endswith("layernorm"):
                weights[name] = 1 + 0.25 * rng.uniform(-1, 1, shape)
                continue
            if name == "sinks":
                weights[name] = rng.uniform(-1, 2, shape)
                continue
            w = rng.uniform(0.25, 1.0, shape) / shape[1]
            if name != "o_proj":
                w[:, 0] *= _LEAK
            if name in ("q_a_proj", "kv_a_proj_with_mqa"):
                w[0] = rng.uniform(0.25, 1.0, shape[1]) * np.where(np.arange(shape[1]) == 0, 1.0, _LEAK / shape[1])
            weights[name] = w
        factors = config.scale * config.q_lora_scale * max(1.0, config.kv_lora_scale)
        weights = self._with_gain(weights, 2 * self.gain / (factors * config.qk_head_dim))
        if config.qk_rope_head_dim:
            # Rotated back, rope dims add to the gradient of the query's latent with either sign.
            n, r = config.qk_nope_head_dim, config.qk_rope_head_dim
            (name,) = {"q_proj", "q_b_proj", "q_gate_proj"} & set(weights)
            rows = weights[name].reshape(config.num_heads, -1, weights[name].shape[-1])
            rows[:, n : n + r] *= n / (4 * r)
        return weights


class LayerGradientDriver:
    """A driver's subject, of which each backward pass gets a layer of its own."""

    def __init__(self, driver: Driver) -> None:
        self.driver = BackwardDriver.of(driver)

    def tensors(self, inputs: LayerGradientInputs) -> Tensors:
        """The weights by name, "hidden", "positions" and "out_grad"."""
        layer, tensor = inputs.layer, self.driver.tensor
        return {
            **{name: tensor(w) for name, w in layer.weights.items()},
            "hidden": tensor(layer.hidden),
            "positions": self.driver.integers(layer.positions, torch.int64),
            "out_grad": tensor(inputs.out_grad),
        }

    def gradients(
        self, inputs: LayerGradientInputs, tensors: Tensors | None = None, names: Sequence[str] = ()
    ) -> Gradients:
        """Gradients of "hidden" and of the weights by name, or only those of ``names``; the others require none.

        ``tensors`` replace those built from ``inputs``.
        """
        tensors = tensors or self.tensors(inputs)
        names = names or ("hidden", *inputs.layer.weights)
        leaves = tensors | {name: tensors[name].detach().requires_grad_() for name in names}
        weights = {name: leaves[name] for name in inputs.layer.weights}
        layer = make_layer(self.driver, weights, inputs.layer.config)
        out = self.driver.guard(lambda: layer.prefill(leaves["hidden"], leaves["positions"]))
        self.driver.result(out, "prefill output", inputs.layer.hidden.shape)
        return self.driver.gradients("layer", leaves, names, out, None)
