"""The operands of the indexer: by hand, from published configurations, and as transformers computes them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from mla_spec.reference.config import RopeConfig, YarnScaling
from mla_spec.reference.indexer import (
    IndexerConfig,
    indexer_weight_shapes,
    layer_norm,
    project_indexer,
)
from mla_spec.reference.rope import half_from_interleaved, rope_cos_sin
from mla_spec.reference.sparse import indexer_logits, select_top_k
from mla_spec.reference.typing import Array

CONFIG = IndexerConfig(
    hidden_size=10,
    q_lora_rank=7,
    index_n_heads=3,
    index_head_dim=8,
    index_topk=4,
    rope=RopeConfig(dim=4, theta=100.0, interleaved=False),
)


def drawn(config: IndexerConfig, tokens: int = 9, seed: int = 1) -> tuple[Array, Array, dict[str, Array]]:
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(shape) for name, shape in indexer_weight_shapes(config).items()}
    return rng.standard_normal((tokens, 10)), rng.standard_normal((tokens, 7)), weights


def test_the_published_indexers() -> None:
    v32, glm = IndexerConfig.published("DeepSeek-V3.2(-Exp)"), IndexerConfig.published("GLM-5")
    assert (v32.index_n_heads, v32.index_head_dim, v32.index_topk, v32.rope_dim) == (64, 128, 2048, 64)
    assert (glm.index_n_heads, glm.index_head_dim, glm.index_topk, glm.rope_dim) == (32, 128, 2048, 64)
    assert v32.rope is not None
    assert v32.rope.active_yarn is not None
    assert glm.rope is not None
    assert (v32.rope.interleaved, glm.rope.interleaved) == (False, True)
    assert indexer_weight_shapes(v32)["wq_b"] == (64 * 128, 1536)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("DeepSeek-V3", "has no indexer"),
        ("Hy4-preview (class default)", "is not published or not the first ones"),
        ("GLM-5.3-Flash (glm5_next)", "is not published or not the first ones"),
        ("A.X-K2-Light", "rope_theta is not published"),
    ],
)
def test_indexers_that_cannot_be_expressed_are_named(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexerConfig.published(model)


def test_a_configuration_must_make_sense() -> None:
    for name in ("hidden_size", "q_lora_rank", "index_n_heads", "index_head_dim", "index_topk"):
        with pytest.raises(ValueError, match=f"^IndexerConfig: {name} must be a positive integer, got 0$"):
            replace(CONFIG, **{name: 0})
    assert replace(CONFIG, rope=RopeConfig(dim=8)).rope_dim == CONFIG.index_head_dim
    with pytest.raises(ValueError, match=r"rope\.dim must not exceed index_head_dim, got 10 and 8"):
        replace(CONFIG, rope=RopeConfig(dim=10))
    with pytest.raises(ValueError, match=r"^IndexerConfig: k_norm_eps must be a positive finite number"):
        replace(CONFIG, k_norm_eps=0.0)
    hidden, q_latent, weights = drawn(CONFIG)
    with pytest.raises(ValueError, match="weights of an indexer must have shapes"):
        project_indexer(hidden, q_latent, np.arange(9), {**weights, "wk": weights["wk"].T}, CONFIG)


def test_layer_norm_has_the_mean_of_its_bias_and_the_deviation_of_its_weight() -> None:
    x = 3 + np.random.default_rng(0).standard_normal((5, 64))
    y = layer_norm(x, np.full(64, 2.0), np.full(64, 0.5), 1e-30)
    np.testing.assert_allclose(y.mean(axis=-1), 0.5, rtol=1e-13)
    np.testing.assert_allclose(y.std(axis=-1), 2.0, rtol=1e-13)
    want = torch.nn.functional.layer_norm(torch.from_numpy(x), (64,), eps=0.1).numpy()
    np.testing.assert_allclose(layer_norm(x, np.ones(64), np.zeros(64), 0.1), want, rtol=1e-12)


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_first_dims_turn_and_the_others_stay(interleaved: bool) -> None:
    config = replace(CONFIG, rope=RopeConfig(dim=4, theta=100.0, interleaved=interleaved))
    hidden, q_latent, weights = drawn(config)
    still = project_indexer(hidden, q_latent, np.zeros(9, dtype=int), weights, config)
    moved = project_indexer(hidden, q_latent, 1000 + np.arange(9), weights, config)
    without = project_indexer(hidden, q_latent, np.arange(9), weights, replace(config, rope=None))
    second = 1 if interleaved else 2
    for x, y, plain in zip(still[:2], moved[:2], without[:2], strict=True):
        np.testing.assert_array_equal(x, plain)
        np.testing.assert_array_equal(x[..., 4:], y[..., 4:])
        pair, turned = x[..., 0] + 1j * x[..., second], y[..., 0] + 1j * y[..., second]
        angle = (1000 + np.arange(9)).reshape((9,) + (1,) * (pair.ndim - 1))
        np.testing.assert_allclose(turned, pair * np.exp(1j * angle), rtol=1e-12)
    np.testing.assert_array_equal(still[2], moved[2])


class Products(TorchFunctionMode):
    """Records the operands of matrix products, and leaves float64 as it is."""

    def __init__(self) -> None:
        self.operands: list[tuple[Array, Array]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0]
        if func is torch.matmul:
            self.operands.append((args[0].numpy(), args[1].numpy()))
        return func(*args, **(kwargs or {}))


@contextmanager
def products() -> Iterator[list[tuple[Array, Array]]]:
    with torch.no_grad(), Products() as mode:
        yield mode.operands


YARN = YarnScaling(factor=8, original_max_position_embeddings=64, beta_fast=4, ramp_guard=0.001)


@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "YaRN"])
@pytest.mark.parametrize(
    ("model", "prefix", "interleaved"), [("deepseek_v32", "DeepseekV32", False), ("glm_moe_dsa", "GlmMoeDsa", True)]
)
def test_transformers_computes_the_same(model: str, prefix: str, interleaved: bool, yarn: YarnScaling | None) -> None:
    """In float64: q, k, the weights of the heads, and the keys selected."""
    pytest.importorskip("transformers", reason="compares with model code of transformers, which is not installed")
    if importlib.util.find_spec(f"transformers.models.{model}") is None:
        pytest.skip(f"this transformers has no {model}")
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    rope = RopeConfig(dim=4, theta=100.0, interleaved=interleaved, yarn=yarn)
    config = replace(CONFIG, rope=rope)
    names = ("hidden_size", "q_lora_rank", "index_n_heads", "index_head_dim", "index_topk")
    theirs = getattr(configuration, f"{prefix}Config")(
        **{name: getattr(config, name) for name in names}, qk_rope_head_dim=4
    )
    indexer = getattr(modeling, f"{prefix}Indexer")(theirs, layer_idx=0).double()
    hidden, q_latent, weights = drawn(config)
    indexer.load_state_dict(
        {name if name.startswith("k_norm") else f"{name}.weight": torch.from_numpy(w) for name, w in weights.items()}
    )
    positions = 3 + np.arange(9)
    cos, sin = (torch.from_numpy(np.tile(x, 2))[None] for x in rope_cos_sin(positions, rope))
    mask = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    with products() as operands:
        chosen = indexer(
            torch.from_numpy(hidden)[None],
            torch.from_numpy(q_latent)[None],
            (cos, sin),
            mask,
            torch.from_numpy(positions),
        )[0]
    (q, k), (w, _) = operands
    want_q, want_k, want_w = project_indexer(hidden, q_latent, positions, weights, config)
    order = np.arange(8)
    if interleaved:  # theirs returns interleaved pairs in halves
        order[:4] = half_from_interleaved(4)
    np.testing.assert_allclose(q[0], want_q[..., order], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(k[0, 0].T, want_k[..., order], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(w[0, :, 0] * config.index_head_dim**-0.5, want_w, rtol=1e-12, atol=1e-13)
    want = select_top_k(indexer_logits(want_q, want_k, want_w), 4, 1 + np.arange(9))
    for i in range(3, 9):  # theirs fills rows of fewer keys with any
        assert set(chosen[i].tolist()) == set(want[i].tolist())
