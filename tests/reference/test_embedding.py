"""Existing layers as MLA: equal outputs, the widths of rows, and the ranks below which they are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.front.cli import main
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.embedding import (
    EmbeddedWeights,
    GroupedAttention,
    GroupedWeights,
    embed,
    embedded_layer,
    exact_row,
    grouped_layer,
)
from mla_spec.reference.grouped_checkpoint import grouped_attention
from mla_spec.reference.mla import Attend, absorbed, explicit
from mla_spec.reference.rope import rope_cos_sin

SAME_IN_FLOAT64 = 1e-13
"""Largest difference of two float64 forms, relative to the largest output; a wrong index is of the size of the output."""

HEADS = {"MHA": (6, 6), "GQA": (6, 2), "MQA": (6, 1)}


def dims_of(kind: str, rotated: int | None = 8, interleaved: bool = False, **changes: Any) -> GroupedAttention:
    rope = None if rotated is None else RopeConfig(dim=rotated, theta=100.0, interleaved=interleaved)
    h, g = HEADS[kind]
    widths = {"hidden_size": 40, "head_dim": 8, "v_head_dim": 5} | changes
    return GroupedAttention(num_heads=h, num_key_value_heads=g, rope=rope, **widths)


def weights_of(dims: GroupedAttention, seed: int = 0) -> GroupedWeights:
    rng = np.random.default_rng(seed)
    e, h, g, d, dv = dims.hidden_size, dims.num_heads, dims.num_key_value_heads, dims.head_dim, dims.v_head_dim
    shapes = (h * d, e), (g * d, e), (g * dv, e), (e, h * dv)
    return GroupedWeights(*(rng.standard_normal(shape) / np.sqrt(shape[1]) for shape in shapes))


def inputs(dims: GroupedAttention) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    return 2 * rng.standard_normal((2, 9, dims.hidden_size)), np.arange(9) + np.array([[3], [90000]])


@pytest.mark.parametrize("attend", [explicit, absorbed])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotated", [None, 2, 8])
@pytest.mark.parametrize("kind", HEADS)
def test_the_embedding_is_the_layer(kind: str, rotated: int | None, interleaved: bool, attend: Attend) -> None:
    dims = dims_of(kind, rotated, interleaved)
    assert dims.kind == kind
    weights, (hidden, positions) = weights_of(dims), inputs(dims)
    want = grouped_layer(hidden, positions, weights, dims)
    got = embedded_layer(hidden, positions, embed(weights, dims), dims, attend)
    assert np.abs(got - want).max() <= SAME_IN_FLOAT64 * np.abs(want).max()


def naive_layer(hidden: Any, positions: Any, weights: GroupedWeights, dims: GroupedAttention) -> Any:
    """One sequence, head by head and token by token, in half layout."""
    assert dims.rope is not None
    d, dv, per_group = dims.head_dim, dims.v_head_dim, dims.num_heads // dims.num_key_value_heads

    def rotated(x: Any) -> Any:
        cos, sin = rope_cos_sin(positions, dims.rope)  # type: ignore[arg-type]
        half = dims.rope_dim // 2
        first, second = x[:, :half], x[:, half : 2 * half]
        return np.concatenate([first * cos - second * sin, first * sin + second * cos, x[:, 2 * half :]], axis=1)

    heads = []
    for head in range(dims.num_heads):
        group = head // per_group
        q = rotated(hidden @ weights.q_proj[head * d : (head + 1) * d].T)
        k = rotated(hidden @ weights.k_proj[group * d : (group + 1) * d].T)
        v = hidden @ weights.v_proj[group * dv : (group + 1) * dv].T
        rows = []
        for t in range(len(hidden)):
            p = np.exp(k[: t + 1] @ q[t] * d**-0.5)
            rows.append(p @ v[: t + 1] / p.sum())
        heads.append(np.stack(rows))
    return np.concatenate(heads, axis=1) @ weights.o_proj.T


@pytest.mark.parametrize("rotated", [2, 8])
@pytest.mark.parametrize("kind", HEADS)
def test_the_layer_is_what_it_is_called(kind: str, rotated: int) -> None:
    dims = dims_of(kind, rotated)
    weights, (hidden, positions) = weights_of(dims), inputs(dims)
    want = naive_layer(hidden[1], positions[1], weights, dims)
    got = grouped_layer(hidden[1], positions[1], weights, dims)
    assert np.abs(got - want).max() <= SAME_IN_FLOAT64 * np.abs(want).max()


@pytest.mark.parametrize("kind", HEADS)
def test_widths_are_those_of_the_old_cache(kind: str) -> None:
    for rotated in (None, 2, 8):
        dims = dims_of(kind, rotated)
        embedded, g = embed(weights_of(dims), dims), dims.num_key_value_heads
        assert dims.kv_lora_rank + dims.qk_rope_head_dim == g * (dims.head_dim + dims.v_head_dim)
        assert embedded.kv_a_proj_with_mqa.shape == (g * (8 + 5), 40)
        assert embedded.kv_b_proj.shape == (6 * (dims.qk_nope_head_dim + 5), dims.kv_lora_rank)
        assert set(np.unique(embedded.kv_b_proj)) <= {0.0, 1.0}


def test_one_rotation_over_all_groups_is_not_exact() -> None:
    """Frequencies that all differ, as a standard MLA layer has them, are another layer where there are several groups."""
    for kind, exact in (("MQA", True), ("GQA", False)):
        dims = dims_of(kind)
        weights, (hidden, positions) = weights_of(dims), inputs(dims)
        want = grouped_layer(hidden, positions, weights, dims)
        embedded = embed(weights, dims)
        wide = GroupedAttention(
            hidden_size=40,
            num_heads=6,
            num_key_value_heads=1,
            head_dim=dims.qk_rope_head_dim,
            v_head_dim=dims.kv_lora_rank,
            rope=RopeConfig(dim=dims.qk_rope_head_dim, theta=100.0, interleaved=False),
        )
        standard = GroupedWeights(
            q_proj=embedded.q_proj * (wide.head_dim / dims.head_dim) ** 0.5,
            k_proj=embedded.kv_a_proj_with_mqa[dims.kv_lora_rank :],
            v_proj=embedded.kv_a_proj_with_mqa[: dims.kv_lora_rank],
            o_proj=_through(embedded, dims),
        )
        apart = np.abs(grouped_layer(hidden, positions, standard, wide) - want).max() / np.abs(want).max()
        assert (apart <= SAME_IN_FLOAT64) == exact
        if not exact:
            assert apart > 1e-2


def _through(embedded: EmbeddedWeights, dims: GroupedAttention) -> Any:
    """The output projection after W_UV, for values that are whole latents."""
    w_uv = embedded.kv_b_proj.reshape(dims.num_heads, -1, dims.kv_lora_rank)[:, dims.qk_nope_head_dim :]
    o = embedded.o_proj.reshape(dims.hidden_size, dims.num_heads, dims.v_head_dim)
    return np.einsum("ehv,hvc->ehc", o, w_uv).reshape(dims.hidden_size, -1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_random_weights_save_nothing(interleaved: bool) -> None:
    for kind in HEADS:
        dims = dims_of(kind, 6, interleaved, hidden_size=60)
        assert exact_row(weights_of(dims), dims) == (dims.kv_lora_rank, dims.qk_rope_head_dim)


@pytest.mark.parametrize("interleaved", [True, False])
def test_keys_that_are_complex_multiples_need_one_pair(interleaved: bool) -> None:
    """Group 1 has the key of group 0 turned by a quarter in every pair: a real rank of 2 and a complex one of 1."""
    dims = dims_of("GQA", 8, interleaved)
    weights = weights_of(dims)
    key = weights.k_proj[:8]
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    turned = np.empty_like(key)
    turned[first], turned[second] = -key[second], key[first]
    doubled = GroupedWeights(weights.q_proj, np.concatenate([key, turned]), weights.v_proj, weights.o_proj)
    assert np.linalg.matrix_rank(doubled.k_proj) == 8
    assert exact_row(doubled, dims) == (10, 8)
    assert exact_row(weights, dims) == (10, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads must divide num_heads, got 4 and 6"),
        ({"head_dim": 0}, "head_dim must be a positive integer, got 0"),
        ({"head_dim": 4}, "rope.dim must not exceed head_dim, got 8 and 4"),
    ],
)
def test_dims_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GroupedAttention: {re.escape(message)}$"):
        GroupedAttention(**{**vars(dims_of("GQA")), **changes})


def test_weights_of_other_shapes_are_refused() -> None:
    weights = weights_of(dims_of("GQA"))
    with pytest.raises(ValueError, match=r"^weights: k_proj must have shape \(8, 40\), got \(16, 40\)$"):
        embed(weights, dims_of("MQA"))


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}


def test_configuration_of_an_existing_model() -> None:
    name, dims = grouped_attention(LLAMA)
    assert name == "llama"
    assert (dims.num_heads, dims.num_key_value_heads, dims.head_dim, dims.v_head_dim, dims.rope_dim) == (8, 2, 8, 8, 8)
    assert dims.rope is not None
    assert (dims.rope.theta, dims.rope.interleaved) == (500000, False)
    _, partial = grouped_attention({**LLAMA, "head_dim": 16, "partial_rotary_factor": 0.25})
    assert (partial.head_dim, partial.rope_dim, partial.qk_nope_head_dim) == (16, 4, 12)
    _, own = grouped_attention(
        {**LLAMA, "rope_theta": None, "rope_parameters": {"rope_theta": 100, "rope_type": "default"}}
    )
    assert own.rope is not None
    assert own.rope.theta == 100
    without = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert grouped_attention(without)[1].kind == "MHA"


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_command_prints_dims_and_computes_both_ways(
    groups: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "num_key_value_heads": groups}), encoding="utf-8")
    assert main(["embed", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    kind = {8: "MHA", 2: "GQA", 1: "MQA"}[groups]
    assert lines[0] == f"{path}: {kind} of 8 heads in {groups} groups, 8 wide, of which 8 are rotated"
    assert lines[2].split() == [kind, "8", "8", str(groups * 16)]
    assert lines[3].split() == ["MLA", "8", str(groups * 8), "0", str(groups * 8), "8", str(groups * 16)]
    differences = [float(found) for found in re.findall(r"([\d.e+-]+) \((?:explicit|absorbed)\)", lines[-1])]
    assert len(differences) == 2
    assert max(differences) <= SAME_IN_FLOAT64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 512}, "kv_lora_rank is stated, so that attention is MLA already"),
        ({"num_attention_heads": None}, "num_attention_heads must be a positive integer, got None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_heads, got 3 and 8"),
        ({"rope_theta": None}, "rope_theta is not stated"),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected a JSON object, got 'yarn'"),
        ({"partial_rotary_factor": 0.4}, "dim (qk_rope_head_dim) must be even, got 3"),
    ],
)
def test_command_refuses_in_one_sentence(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **changes}), encoding="utf-8")
    assert main(["embed", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"mla-spec: {path}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
