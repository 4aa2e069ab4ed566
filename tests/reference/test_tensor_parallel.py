"""Shards are layers whose outputs add up, and gathering gradients is the transpose of sharding weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mla_spec.operations.shards import ShardedLayerCase
from mla_spec.reference.layer_backward import layer_backward
from mla_spec.reference.mla import layer, weight_shapes
from mla_spec.reference.tensor_parallel import gather_gradients, shard_layer

CASES = [
    ShardedLayerCase(
        dtype="float64",
        seed=ranks,
        batch=2,
        prompt=5,
        hidden_size=10,
        num_heads=6,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=7,
        qk_nope_head_dim=3,
        qk_rope_head_dim=4,
        v_head_dim=5,
        mla_scale_kv_lora=True,
        ranks=ranks,
    )
    for ranks in (1, 2, 3, 6)
    for q_lora_rank in (None, 8)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ranks}-{case.q_lora_rank}")
def test_outputs_of_shards_add_up(case: ShardedLayerCase) -> None:
    inputs = case.build()
    want, cache = layer(inputs.hidden, inputs.positions, inputs.weights, inputs.config)
    parts = [layer(inputs.hidden, inputs.positions, *s) for s in shard_layer(inputs.weights, inputs.config, case.ranks)]
    np.testing.assert_allclose(sum(out for out, _ in parts), want, rtol=1e-13, atol=1e-14)
    for _, own in parts:
        np.testing.assert_array_equal(own.latent, cache.latent)
        np.testing.assert_array_equal(own.k_pe, cache.k_pe)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ranks}-{case.q_lora_rank}")
def test_gathering_gradients_is_the_transpose_of_sharding(case: ShardedLayerCase) -> None:
    """Σ_ranks ⟨gradient, shard of a change⟩ = ⟨gathered gradient, change⟩ for every change of the weights, in integers."""
    rng = np.random.default_rng(0)
    change = {name: rng.integers(-8, 9, shape).astype(float) for name, shape in weight_shapes(case.config).items()}
    gradients = case.gradients()
    shards = shard_layer(change, case.config, case.ranks)
    by_rank = sum((g[name] * w).sum() for g, (own, _) in zip(gradients, shards, strict=True) for name, w in own.items())
    gathered = gather_gradients(gradients)
    assert set(gathered) == set(change)
    assert by_rank == sum((gathered[name] * w).sum() for name, w in change.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ranks}-{case.q_lora_rank}")
def test_gathered_gradients_of_shards_are_those_of_the_whole_layer(case: ShardedLayerCase) -> None:
    inputs = case.build()
    tokens, out_grad = (inputs.hidden, inputs.positions), np.random.default_rng(1).standard_normal(inputs.hidden.shape)
    want_hidden, want = layer_backward(*tokens, inputs.weights, inputs.config, out_grad)
    shards = shard_layer(inputs.weights, inputs.config, case.ranks)
    parts = [layer_backward(*tokens, *shard, out_grad) for shard in shards]
    np.testing.assert_allclose(sum(hidden for hidden, _ in parts), want_hidden, rtol=1e-12, atol=1e-13)
    got = gather_gradients([gradients for _, gradients in parts])
    assert set(got) == set(want)
    for name, gradient in want.items():
        np.testing.assert_allclose(got[name], gradient, rtol=1e-12, atol=1e-12, err_msg=name)


def test_heads_must_divide_among_ranks() -> None:
    inputs = CASES[0].build()
    for ranks in (4, 12, 0):
        with pytest.raises(ValueError, match=f"6 heads cannot be divided among {ranks} ranks"):
            shard_layer(inputs.weights, inputs.config, ranks)
    with pytest.raises(ValueError, match="missing 'o_proj'"):
        shard_layer({n: w for n, w in inputs.weights.items() if n != "o_proj"}, replace(inputs.config), 2)
