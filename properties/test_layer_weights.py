"""Laws of the weights of a ``layer``: what it uses after they have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.layer import LayerCase, LayerDriver, LayerInputs
from mla_spec.properties.strategies.layer import layer_cases, rotating_layer
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import TORCH_DTYPES, Tensors
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

LAYER = ("layer",)


def _needs_live_weights(supports: Supports) -> str:
    return "" if supports.layer_weights == "live" else "its layers keep a copy of the weights they were made with"


def _later(case: LayerCase) -> LayerInputs:
    """The same layer and tokens, with the weights of a later step of training."""
    inputs = case.build()
    return replace(inputs, weights=replace(case, seed=case.seed + 1).build().weights)


def _changed(case: LayerCase, later: LayerInputs) -> dict[str, Array]:
    """What a step of training writes: all weights, or one of them, as an adapter that is merged does."""
    names = sorted(later.weights)
    chosen = names if case.seed % 2 else [names[case.seed // 2 % len(names)]]
    return {name: later.weights[name] for name in chosen}


def _use(layer: LayerDriver, inputs: LayerInputs, case: LayerCase) -> None:
    """A prompt, decoded tokens, and an empty cache again."""
    layer.run("prefill", inputs.hidden[:, : case.prompt], inputs.positions[:, : case.prompt])
    if case.steps:
        layer.run("decode", inputs.hidden[:, case.prompt :], inputs.positions[:, case.prompt :])
    layer.reset()


def _judge(
    run: Run, layer: LayerDriver, inputs: LayerInputs, case: LayerCase, why: str, by_token: bool = False
) -> None:
    """The prompt, and the token after it, against the reference with the weights of ``inputs``; ``by_token`` decodes both."""
    want, bound = layer_with_bound(inputs.hidden, inputs.positions, inputs.weights, inputs.config, run.profile)
    run.meaningful(want, bound)
    calls = [("prefill", slice(0, case.prompt)), ("decode", slice(case.prompt, case.prompt + case.steps))]
    if by_token:
        calls = [("decode", slice(t, t + 1)) for t in range(case.prompt + case.steps)]
    for method, tokens in calls if by_token else calls[: 1 + (case.steps > 0)]:
        got = layer.run(method, inputs.hidden[:, tokens], inputs.positions[:, tokens])
        try:
            run.within(got, want[:, tokens], bound[:, tokens], gate=False)
        except Violation as violation:
            raise Violation(f"{violation}\n{why}") from None


def _each_weight(supports: Supports, profile: Profile) -> list[LayerCase]:
    """Layers that together have every weight which one of the subject may have, of which each changes in turn."""
    (base,) = rotating_layer(supports, profile)
    cases, changed = [], set[str]()
    for gate in ("none", *supports.output_gate):
        case = replace(
            base,
            steps=min(base.steps, 1),
            q_lora_rank=5,
            k_pe_norm=supports.k_pe_norm,
            output_gate=gate,
            attention_sink="layer" in supports.dense_sink,
        )
        names = sorted(weight_shapes(case.config))
        cases += [replace(case, seed=2 * i) for i, name in enumerate(names) if name not in changed]
        changed.update(names)
    return cases


@law(
    needs=LAYER,
    cases=narrowed(layer_cases, min_steps=1, max_steps=1),
    missing=_needs_live_weights,
    cost=2,
    first=_each_weight,
)
def test_layer_uses_weights_overwritten_in_place(run: Run, case: LayerCase) -> None:
    """After one or all of its weights were overwritten in place, and a reset, a layer prefills and decodes with the new ones."""
    inputs = case.build()
    layer = there(LayerDriver.of, run.driver, inputs.weights, inputs.config)
    _use(layer, inputs, case)
    changed = _changed(case, _later(case))
    layer.overwrite_weights(changed)
    layer.reset()
    now = replace(inputs, weights=inputs.weights | changed)
    why = f"overwritten since the layer was made: {', '.join(changed)}"
    _judge(run, layer, now, case, why, by_token=run.supports.layer_cache != "none" and case.seed % 3 == 0)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: its memory, and which Python object it is."""

    storage: torch.UntypedStorage
    size: torch.Size
    stride: tuple[int, ...]
    identity: int


def _places(layer: LayerDriver) -> dict[str, _Place]:
    """Where the weights of a layer are."""
    return {name: _Place(w.untyped_storage(), w.size(), w.stride(), id(w)) for name, w in layer.weights.items()}


def _tensors_at(places: Mapping[str, _Place], dtype: str) -> Tensors:
    """New tensors in the memory of those that are gone, and of many Python objects the ones that those were, if it can be."""
    old, device = {place.identity for place in places.values()}, next(iter(places.values())).storage.device
    fresh = [torch.empty(0, dtype=TORCH_DTYPES[dtype], device=device) for _ in range(8 * len(places))]
    again = {id(x): x for x in fresh if id(x) in old}
    others = [x for x in fresh if id(x) not in old]
    chosen = {name: again.get(place.identity, others[i]) for i, (name, place) in enumerate(places.items())}
    return {
        name: x.set_(at.storage, 0, at.size, at.stride)
        for (name, x), at in zip(chosen.items(), places.values(), strict=True)
    }


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1, max_steps=1), cost=2)
def test_layer_made_again_uses_its_own_weights(run: Run, case: LayerCase) -> None:
    """A layer made after another of equal shapes is gone, whose memory its weights now have, uses none of the other's."""
    inputs, later = case.build(), _later(case)
    first = there(LayerDriver.of, run.driver, inputs.weights, inputs.config)
    _use(first, inputs, case)
    first.overwrite_weights(later.weights)
    places = there(_places, first)
    del first
    tensors = there(_tensors_at, places, run.driver.dtype)
    second = there(LayerDriver.holding, run.driver, tensors, later.config)
    _judge(run, second, later, case, "an earlier layer had other weights at the same addresses")
