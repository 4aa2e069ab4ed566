"""Laws of ``shard_layer`` and ``gather_gradients``: the heads of a layer divided among ranks, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.layer import LayerDriver, LayerInputs
from mla_spec.operations.shards import ParallelDriver, ShardedLayerCase
from mla_spec.properties.hazards import require_unmodified
from mla_spec.properties.strategies.layer import draw_layer, rotating_layer
from mla_spec.properties.strategies.sizes import choice, narrowed
from mla_spec.reference.formats import format_of
from mla_spec.reference.tensor_parallel import gather_gradients, shard_layer
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result, computed
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports

SHARD = ("shard_layer",)
GATHER = ("gather_gradients",)


@st.composite
def sharded_layer_cases(draw: DrawFn, supports: Supports, profile: Profile, *, max_steps: int = 3) -> ShardedLayerCase:
    """Layers with as many heads for each of a few ranks as others have in all."""
    case = draw_layer(draw, supports, profile, max_steps=max_steps)
    ranks = draw(choice(2, 3, 4, 8))
    heads = ranks * (case.num_heads if ranks < 8 else 1)
    whole = replace(case, num_heads=heads, batch=min(case.batch, 2), prompt=min(case.prompt, 4))
    return ShardedLayerCase(**vars(whole), ranks=ranks)


RANKS = ((12, 12), (6, 6), (48, 16), (96, 32))
"""Heads and ranks: ranks of several nodes, no powers of two, and heads of a rank that are no whole tile."""


def many_ranks(supports: Supports, profile: Profile) -> list[ShardedLayerCase]:
    """Small layers, with the gradients that the subject's layers have, among many ranks."""
    options: dict[str, object] = {"k_pe_norm": supports.k_pe_norm, "attention_sink": "layer" in supports.dense_sink}
    (base,) = rotating_layer(supports, profile)
    return [
        ShardedLayerCase(**vars(base) | options | {"num_heads": heads, "ranks": ranks, "steps": 0})
        for heads, ranks in RANKS
        if supports.num_heads is None or heads in supports.num_heads
    ]


@law(needs=SHARD, cases=narrowed(sharded_layer_cases, max_steps=0), cost=2, first=many_ranks)
def test_shards_partition_the_weights(run: Run, case: ShardedLayerCase) -> None:
    """Each rank has the rows and columns of its heads and all of the rest, bit for bit."""
    inputs = case.build()
    shards = there(ParallelDriver, run.driver).shards(inputs.weights, inputs.config, case.ranks)
    for shard, (weights, _) in zip(shards, shard_layer(inputs.weights, inputs.config, case.ranks), strict=True):
        for name, got in shard.weights().items():
            _require_equal(run, got, weights[name], "not what this rank has of the layer's weight")


@law(needs=("shard_layer", "layer"), cases=sharded_layer_cases, cost=5)
def test_outputs_of_shards_add_up(run: Run, case: ShardedLayerCase) -> None:
    """The sum of what the ranks' layers give, in prefill and then in decode, is what the whole layer gives."""
    inputs = case.build()
    want, bound = _expected(run, inputs, case.ranks)
    run.meaningful(want, bound)
    layers = [
        shard.layer() for shard in there(ParallelDriver, run.driver).shards(inputs.weights, inputs.config, case.ranks)
    ]
    for method, tokens in (("prefill", np.s_[: case.prompt]), ("decode", np.s_[case.prompt :])):
        if want[:, tokens].size:
            total = _sum_over_ranks(layers, method, inputs, tokens)
            run.within(total, want[:, tokens], bound[:, tokens], gate=False)


def _expected(run: Run, inputs: LayerInputs, ranks: int) -> tuple[Array, ErrorBound]:
    """The whole layer, and how far the float64 sum of the ranks' outputs may be from it."""
    arguments = inputs.hidden, inputs.positions
    parts = [layer_with_bound(*arguments, *s, run.profile) for s in shard_layer(inputs.weights, inputs.config, ranks)]
    want, own = layer_with_bound(*arguments, inputs.weights, inputs.config, Profile.default("float64"))
    errors: Array = np.sum([error.total for _, error in parts], axis=0)
    sizes: Array = np.sum([np.abs(value) for value, _ in parts], axis=0) + errors
    sums = own.total + ranks * format_of("float64").unit_roundoff * sizes
    return want, ErrorBound({"errors of the ranks": errors, "the reference's and the sum's own float64": sums})


def _sum_over_ranks(layers: Sequence[LayerDriver], method: str, inputs: LayerInputs, tokens: slice) -> Result:
    parts = [layer.run(method, inputs.hidden[:, tokens], inputs.positions[:, tokens]).value for layer in layers]
    return computed(np.sum(parts, axis=0), f"sum of the ranks' {method} outputs")


@law(needs=("shard_layer", "layer"), cases=narrowed(sharded_layer_cases, max_steps=0), cost=5)
def test_every_shard_caches_the_whole_latent(run: Run, case: ShardedLayerCase) -> None:
    """A rank's cache takes as many bytes as the whole layer's, whatever the number of ranks: one latent serves all heads."""
    inputs = case.build()
    shards = there(ParallelDriver, run.driver).shards(inputs.weights, inputs.config, case.ranks)
    layers = [there(LayerDriver.of, run.driver, inputs.weights, inputs.config), *(shard.layer() for shard in shards)]
    for layer in layers:
        layer.run("prefill", inputs.hidden, inputs.positions)
    want, *got = [layer.cache_bytes() for layer in layers]
    for rank, count in enumerate(got):
        run.require(count == want, f"the cache of rank {rank} takes {count} bytes, that of the whole layer {want}")


@law(needs=GATHER, cases=narrowed(sharded_layer_cases, max_steps=0), cost=2, first=many_ranks)
def test_gathered_gradients_are_exact(run: Run, case: ShardedLayerCase) -> None:
    """Gradients of heads are joined, those of what all ranks share are added, bit for bit where sums are exact."""
    driver, gradients = there(ParallelDriver, run.driver), case.gradients()
    got = driver.gathered([driver.weights(g) for g in gradients], case.config)
    for name, want in gather_gradients(gradients).items():
        _require_equal(run, got[name], want, "not the gradient of the whole layer's weight")


@law(needs=GATHER, cases=narrowed(sharded_layer_cases, max_steps=0), cost=2)
def test_gather_gradients_does_not_modify_its_inputs(run: Run, case: ShardedLayerCase) -> None:
    """No rank's gradient has changed when they are gathered."""
    driver = there(ParallelDriver, run.driver)
    gradients = [driver.weights(g) for g in case.gradients()]
    tensors = {f"{name} of rank {rank}": x for rank, g in enumerate(gradients) for name, x in g.items()}
    require_unmodified(run, "gather_gradients", tensors, lambda: driver.gathered(gradients, case.config))


def _require_equal(run: Run, got: Result, want: Array, why: str) -> None:
    different = got.value != want
    if different.any():
        index = tuple(int(i) for i in np.argwhere(different)[0])
        run.require(
            False,
            f"{got.what}{list(index)}: got {float(got.value[index])!r}, want {float(want[index])!r}: {why}\n"
            f"{int(different.sum())} of {want.size} elements differ",
        )
