"""Ball arithmetic and the float64 reference, two implementations that share no formula, against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.profile import gamma
from mla_spec.golden.cases.case import layer_weights
from mla_spec.golden.corpus import compare
from mla_spec.reference.config import Llama4Scaling, LongRopeScaling, MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.formats import format_of
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.published import published_models
from mla_spec.reference.rope import rope_cos_sin, rope_frequencies

pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")

from mla_spec.golden.exact import balls as certified
from mla_spec.golden.exact.expected import expected

YARN = YarnScaling(factor=40, original_max_position_embeddings=4096, ramp_guard=0.001)
LONGROPE = LongRopeScaling(
    short_factor=(1.0, 1.1, 1.3), long_factor=(1.2, 3.0, 31.7), original_max_position_embeddings=4096
)


def agrees(operation: str, inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
    """The reference stays within its own allowance of the certified results."""
    want = expected(operation, inputs, parameters)
    compare.compare(operation, inputs, parameters, want, [])


# Rounding


def one(x: Any) -> float:
    return float(certified.rounded(lambda: [np.array([x()], dtype=object)])[0][0])


def test_results_are_rounded_once_and_to_nearest() -> None:
    arb = certified.arb
    assert one(lambda: arb(1) / 3) == 1 / 3
    assert one(lambda: arb(1) + arb(2) ** -53) == 1.0  # an exact tie goes to even
    assert one(lambda: arb(1) + arb(2) ** -53 + arb(2) ** -400) == 1.0 + 2.0**-52
    assert one(lambda: arb(2) ** -1074 * 3 / 4) == 5e-324
    assert one(lambda: arb(2) ** -1075) == 0.0
    assert one(arb.neg_inf) == -np.inf
    assert str(one(lambda: -(arb(2) ** -2000))) == "0.0"


def test_cancellation_raises_the_precision() -> None:
    assert one(lambda: (1 + certified.arb(10) ** -200) - 1) == 1e-200


def test_what_has_no_double_is_refused() -> None:
    arb = certified.arb
    with pytest.raises(certified.NotRoundable):
        one(lambda: arb("nan"))
    with pytest.raises(certified.NotRoundable):
        one(lambda: arb(10) ** 400)
    with pytest.raises(certified.NotRoundable):  # a tie that is never known to be one
        one(lambda: 1 + (arb(3).sqrt() ** 2 - 3) + arb(2) ** -53)


# Rotary embedding


def rope_configs() -> Iterator[RopeConfig]:
    for dim in (2, 8, 64):
        for theta in (10.0, 10000.0, 8e6):
            yield RopeConfig(dim=dim, theta=theta)
    yield RopeConfig(dim=64, yarn=YARN)
    yield RopeConfig(dim=64, theta=50000.0, yarn=replace(YARN, factor=32, beta_fast=1))
    yield RopeConfig(dim=2, yarn=YARN)
    yield RopeConfig(dim=8, interleaved=False, yarn=replace(YARN, mscale=0.707, mscale_all_dim=0.5))
    yield RopeConfig(dim=16, yarn=replace(YARN, factor=1.0))
    yield RopeConfig(dim=16, yarn=replace(YARN, original_max_position_embeddings=64))
    yield RopeConfig(dim=6, longrope=LONGROPE, max_position_embeddings=4096)
    yield RopeConfig(dim=6, longrope=LONGROPE, max_position_embeddings=131072)


def test_frequencies_are_correctly_rounded_and_tables_within_one_ulp_of_1() -> None:
    near = np.arange(0, 300, 7)
    powers = 2 ** np.arange(21)
    positions = np.unique(np.concatenate([near, powers, powers - 1, -powers, [4097, 65537, 163839, 999983]]))
    worst = 0.0
    for rope in rope_configs():
        frequencies, cos, sin = certified.rounded(
            lambda rope=rope: [certified.rope_frequencies(rope), *certified.cos_sin(positions, rope)]
        )
        np.testing.assert_array_equal(rope_frequencies(rope), frequencies)
        for got, want in zip(rope_cos_sin(positions, rope), (cos, sin), strict=True):
            worst = max(worst, float(np.abs(got - want).max()))
    assert worst <= np.finfo(np.float64).eps / 2


def test_rotation_of_published_models() -> None:
    rng = np.random.default_rng(1)
    positions = np.array([0, 1, 4096, 2**20])
    for model in published_models().values():
        if model.is_mla and model.fields["rope"] == "rotary" and not model.not_modelled:
            try:
                rope = model.mla_config().rope
            except ValueError:
                continue
            assert rope is not None
            x = rng.standard_normal((len(positions), 2, rope.dim))
            agrees("rope", {"x": x, "positions": positions}, {"rope": as_json(rope)})


def as_json(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)


@pytest.mark.parametrize(
    "yarn",
    [
        YARN,
        replace(YARN, mscale=0.707, mscale_all_dim=0.707),
        replace(YARN, mscale=1.0, mscale_all_dim=0.0),
        replace(YARN, mscale=None, mscale_all_dim=None),
        replace(YARN, mscale=None, mscale_all_dim=0.5, attention_factor_rule="transformers"),
        replace(YARN, attention_factor=0.9, softmax_mscale=1.3),
        replace(YARN, factor=1.0),
    ],
)
def test_scale_and_factor(yarn: YarnScaling) -> None:
    rope = RopeConfig(dim=4, yarn=yarn)
    config = MLAConfig(
        hidden_size=1,
        num_heads=1,
        q_lora_rank=None,
        kv_lora_rank=1,
        qk_nope_head_dim=7,
        qk_rope_head_dim=4,
        v_head_dim=1,
        rope=rope,
    )
    scale, factor = one(lambda: certified.softmax_scale(config)), one(lambda: certified.cos_sin_factor(rope))
    # Five roundings of mscale, squared, and three of the product and the root.
    few = gamma(2 * 5 + 3, format_of("float64").unit_roundoff)
    assert abs(config.scale - scale) <= few * scale
    assert abs(rope.cos_sin_factor - factor) <= few * factor


# Attention


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_decode(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    b, s, h = (int(n) for n in rng.integers(1, 4, 3))
    c, r, page_size = int(rng.integers(1, 9)), 2 * int(rng.integers(0, 4)), int(rng.integers(1, 5))
    lengths = rng.integers(0, 12, b).astype(np.int32)
    table = rng.permutation(b * 12).reshape(b, 12).astype(np.int32)
    cache = rng.standard_normal((b * 12, page_size, 1, c + r)) + 1
    inputs = {
        "q": size * rng.standard_normal((b, s, h, c + r)),
        "kv_cache": cache,
        "block_table": table,
        "cache_seqlens": lengths,
    }
    agrees("decode", inputs, {"softmax_scale": 0.3, "head_dim_v": c, "causal": bool(seed % 2)})


@pytest.mark.parametrize("seed", range(4))
def test_ragged_decode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    c, page_size = 3, int(rng.integers(1, 4))
    queries, keys = rng.integers(0, 4, 4), rng.integers(0, 9, 4)
    inputs = {
        "q": rng.standard_normal((int(queries.sum()), 2, c + 2)),
        "kv_cache": rng.standard_normal((36, page_size, 1, c + 2)) + 1,
        "block_table": rng.permutation(36).reshape(4, 9).astype(np.int32),
        "cache_seqlens": keys.astype(np.int32),
        "cu_seqlens_q": np.cumsum([0, *queries]).astype(np.int32),
    }
    agrees("ragged_decode", inputs, {"softmax_scale": 0.3, "head_dim_v": c, "causal": bool(seed % 2)})


@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1e150])
def test_extreme_values(magnitude: float) -> None:
    rng = np.random.default_rng(5)
    inputs = {
        "q": rng.standard_normal((3, 2, 4)) / magnitude if magnitude > 1 else rng.standard_normal((3, 2, 4)),
        "k": rng.standard_normal((5, 2, 4)),
        "v": rng.standard_normal((5, 2, 3)) * magnitude,
        "cu_seqlens_q": np.array([0, 1, 3]),
        "cu_seqlens_k": np.array([0, 4, 5]),
    }
    agrees("prefill", inputs, {"softmax_scale": 0.5, "causal": True})


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_merging_parts_is_attention_over_all_keys(size: float) -> None:
    rng = np.random.default_rng(2)
    q, k, v = size * rng.standard_normal((1, 2, 3)), rng.standard_normal((7, 1, 3)), rng.standard_normal((7, 1, 2))

    def merged() -> list[Any]:
        scale = certified.arb(0.5)
        parts = [certified.attention(q, k[t], v[t], scale=scale, causal=False) for t in (slice(4), slice(4, 7))]
        outs, lses = (np.stack(x)[:, None] for x in zip(*parts, strict=True))
        weights = np.exp(lses)  # balls, so that nothing is rounded between the parts and the merge
        out = (np.swapaxes(weights, -1, -2)[..., None] * outs).sum(axis=0) / np.swapaxes(weights.sum(axis=0), 1, 2)[
            ..., None
        ]
        return [out[0], np.log(weights.sum(axis=0))[0]]

    whole = certified.rounded(lambda: certified.attention(q, k, v, scale=certified.arb(0.5), causal=False))
    for got, want in zip(certified.rounded(merged), whole, strict=True):
        np.testing.assert_array_equal(got, want)
    outs, lses = rng.standard_normal((3, 2, 2, 3, 4)), size * rng.standard_normal((3, 2, 3, 2))
    lses[0, 0], lses[:, 1, 0] = -np.inf, -np.inf
    agrees("merge", {"outs": outs, "lses": lses}, {})


# Layer


def layer_inputs(seed: int, size: float, **changes: Any) -> tuple[dict[str, Any], MLAConfig]:
    rng = np.random.default_rng(seed)
    fields = {"q_lora_rank": 5, "qk_rope_head_dim": 4, "rope": RopeConfig(dim=4), **changes}
    config = MLAConfig(hidden_size=9, num_heads=2, kv_lora_rank=8, qk_nope_head_dim=3, v_head_dim=6, **fields)
    inputs: dict[str, Any] = {}
    for name, shape in weight_shapes(config).items():
        inputs[f"weights.{name}"] = rng.standard_normal(shape)
    inputs["hidden"] = size * rng.standard_normal((2, 5, 9))
    inputs["positions"] = np.arange(5) + np.array([[0], [2**20 - 5]])
    return inputs, config


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"rope": None},
        {"rope": None, "qk_rope_head_dim": 0},
        {"rope": RopeConfig(dim=4, interleaved=False, yarn=YARN)},
        {"rope": RopeConfig(dim=4, theta=100.0, yarn=replace(YARN, mscale=0.7, mscale_all_dim=0.5))},
        {"softmax_scale": 0.25, "latent_norm_eps": 1e-5},
        {"qk_rope_head_dim": 6, "rope": RopeConfig(dim=6, longrope=LONGROPE, max_position_embeddings=131072)},
        {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
        {"k_pe_norm": True},
        {"k_pe_norm": True, "rope": None},
        {"llama_4_scaling": Llama4Scaling(beta=0.1, original_max_position_embeddings=2)},
        {"output_gate": "head"},
        {"output_gate": "element", "attention_sink": True, "q_lora_rank": None},
        {"output_gate": "query", "rope": None},
    ],
)
def test_layer(changes: dict[str, Any], size: float) -> None:
    inputs, config = layer_inputs(3, size, **changes)
    agrees("layer", inputs, {"config": as_json(config), "prompt": 3})


@pytest.mark.parametrize("options", [{}, {"attention_sink": True, "output_gate": "head"}])
def test_absorbed_and_explicit_layers_round_to_the_same_doubles(options: dict[str, Any]) -> None:
    inputs, config = layer_inputs(4, 1.0, **options)
    weights = layer_weights(inputs)
    arguments = (inputs["hidden"], inputs["positions"], weights, config)
    both = [
        certified.rounded(lambda form=form: [certified.layer(*arguments, form)])[0]
        for form in (certified.explicit, certified.absorbed)
    ]
    np.testing.assert_array_equal(both[0], both[1])
