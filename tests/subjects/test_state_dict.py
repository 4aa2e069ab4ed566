"""Weights from a state dict: names, scales of blocks, and one sentence for each mismatch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.reference.block_scales import quantise_weight
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import layer, weight_shapes
from mla_spec.subjects.state_dict import OWN_NAMES, layer_weights

CONFIG = MLAConfig(
    hidden_size=12, num_heads=2, q_lora_rank=7, kv_lora_rank=9, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5
)
LAYER = "model.layers.3.self_attn."
State = dict[str, torch.Tensor]


def state(config: MLAConfig = CONFIG, prefix: str = LAYER, suffix: str = ".weight", seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}{name}{suffix}": torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        for name, shape in weight_shapes(config).items()
    }


def quantized(power_of_two: bool) -> tuple[State, dict[str, Any]]:
    """FP8 weights in blocks of 4 by 3 with their scales, and the exact numbers."""
    stored, exact = state(), {}
    for key in [key for key in stored if "layernorm" not in key]:
        weight = stored[key].to(torch.float64).numpy()
        codes, scales = quantise_weight(weight, (4, 3), power_of_two=power_of_two)
        stored[key] = torch.from_numpy(codes).to(torch.float8_e4m3fn)
        stored[f"{key}_scale_inv"] = torch.from_numpy(scales).to(torch.float32)
        rows, columns = np.arange(codes.shape[0])[:, None] // 4, np.arange(codes.shape[1]) // 3
        exact[key.split(".")[-2]] = codes * scales[rows, columns]
    return stored, exact


@pytest.mark.parametrize(("prefix", "suffix"), [(LAYER, ".weight"), ("", ".weight"), ("", ""), ("attn.", "")])
@pytest.mark.parametrize("explicit", [True, False])
def test_prefix_and_suffix_are_stripped(prefix: str, suffix: str, explicit: bool) -> None:
    stored = state(prefix=prefix, suffix=suffix)
    weights = layer_weights(stored, CONFIG, prefix=prefix if explicit else None)
    assert {name: w.shape for name, w in weights.items()} == weight_shapes(CONFIG)
    for name, w in weights.items():
        assert w.dtype == np.float64
        np.testing.assert_array_equal(w, stored[f"{prefix}{name}{suffix}"].double().numpy())


def test_one_of_several_layers() -> None:
    both = {**state(), **state(prefix="model.layers.4.self_attn.", seed=1)}
    chosen = layer_weights(both, CONFIG, prefix="model.layers.4.self_attn.")
    np.testing.assert_array_equal(chosen["o_proj"], layer_weights(state(seed=1), CONFIG)["o_proj"])
    message = f"the state dict has 2 layers, of {LAYER!r}, 'model.layers.4.self_attn.'; name one by prefix"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_weights(both, CONFIG)


def test_deepseeks_own_names() -> None:
    own = {known: name for name, known in OWN_NAMES.items()}
    stored = {f"layers.3.attn.{own[key.split('.')[-2]]}.weight": w for key, w in state().items()}
    weights = layer_weights(stored, CONFIG)
    for name, w in layer_weights(state(), CONFIG).items():
        np.testing.assert_array_equal(weights[name], w)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("suffix", ["weight_scale_inv", "scale"])
def test_scales_of_blocks_are_applied(power_of_two: bool, suffix: str) -> None:
    stored, exact = quantized(power_of_two)
    stored = {key.replace("weight_scale_inv", suffix): w for key, w in stored.items()}
    weights = layer_weights(stored, CONFIG, block_size=(4, 3))
    assert exact.keys() < weights.keys()
    for name, w in exact.items():
        np.testing.assert_array_equal(weights[name], w)


def test_what_lies_beside_the_weights_is_ignored() -> None:
    beside = {f"{LAYER}rotary_emb.inv_freq": torch.ones(1), f"{LAYER}indexer.wk.weight": torch.ones(3, 3)}
    other = {"model.layers.3.mlp.gate.weight": torch.ones(2, 2)}
    assert layer_weights({**state(), **beside, **other}, CONFIG).keys() == weight_shapes(CONFIG).keys()


def test_the_reference_takes_them() -> None:
    hidden = np.random.default_rng(0).standard_normal((1, 3, CONFIG.hidden_size))
    out, _ = layer(hidden, np.arange(3)[None], layer_weights(state(), CONFIG), CONFIG)
    assert out.shape == hidden.shape


def changed(**changes: torch.Tensor | None) -> State:
    """The state with other tensors, or without some."""
    stored = state() | {LAYER + key.replace("__", "."): w for key, w in changes.items() if w is not None}
    for key in (LAYER + key.replace("__", ".") for key, w in changes.items() if w is None):
        del stored[key]
    return stored


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, "the state dict has no weight of MLA"),
        (changed(o_proj__weight=None), "missing 'o_proj'"),
        (changed(q_proj__weight=torch.ones(12, 12)), "unexpected 'q_proj'"),
        (changed(o_proj__weight=torch.ones(10, 12)), "o_proj must have shape (12, 10), got (10, 12)"),
        (changed(o_proj__bias=torch.ones(12)), f"{LAYER + 'o_proj.bias'!r} is no weight of MLA"),
        (changed(g_proj__weight=torch.ones(2, 2)), f"{LAYER + 'g_proj.weight'!r} is no weight of MLA"),
        (changed(wo__weight=torch.ones(12, 10)), f"o_proj is stated twice, the second time as {LAYER + 'wo.weight'!r}"),
        (
            changed(o_proj__weight=torch.ones(12, 10, dtype=torch.int8)),
            "o_proj must be of a floating dtype, got torch.int8",
        ),
        (
            changed(o_proj__weight=torch.ones(12, 10).to(torch.float8_e4m3fn)),
            "o_proj is float8_e4m3fn but has no scales beside it",
        ),
        (
            changed(o_proj__weight_scale_inv=torch.ones(1, 1)),
            "o_proj is bfloat16 but has scales; expected float8_e4m3fn",
        ),
        (changed(q_proj__weight_scale_inv=torch.ones(1, 1)), "q_proj has scales but no weight"),
        (
            changed(
                o_proj__weight=torch.ones(12, 10).to(torch.float8_e4m3fn), o_proj__weight_scale_inv=torch.ones(2, 1)
            ),
            "o_proj: a weight [12, 10] in blocks of (128, 128) has scales [1, 1], got [2, 1]",
        ),
    ],
)
def test_mismatches_are_one_sentence(stored: State, message: str) -> None:
    with pytest.raises(ValueError, match=f"^weights: {re.escape(message)}[^\n]*$"):
        layer_weights(stored, CONFIG)


def test_a_prefix_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"^weights: no key begins with 'model.layers.9.'$"):
        layer_weights(state(), CONFIG, prefix="model.layers.9.")


def test_transformers_module_is_read() -> None:
    transformers = pytest.importorskip("transformers", reason="reads a module of transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    widths = {name: getattr(CONFIG, name) for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    config = transformers.DeepseekV3Config(
        hidden_size=12, num_attention_heads=2, num_key_value_heads=2, qk_rope_head_dim=2, **widths
    )
    module = DeepseekV3Attention(config, layer_idx=0)
    weights = layer_weights(module.state_dict(), CONFIG)
    for name, w in weights.items():
        np.testing.assert_array_equal(w, module.get_parameter(f"{name}.weight").detach().double().numpy())
