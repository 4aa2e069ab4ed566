"""Layers of which one step does nothing: where the layer is right then, the step is at fault, or what it is given.

A layer that hands out its stages also says which of them is the first to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.layer import bounded_stages, layer_with_bound
from mla_spec.judging.finding import Finding
from mla_spec.judging.judge import ratios
from mla_spec.judging.verdict import VacuousCase
from mla_spec.operations.layer import LayerCase, LayerDriver, LayerInputs
from mla_spec.reference.rope import apply_rope
from mla_spec.reference.typing import Array
from mla_spec.subjects.description import Description
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import there
from mla_spec.subjects.violation import NotOffered, SubjectCrashed, Unsupported, Violation

Calls = list[tuple[str, slice]]
"""Methods, and the tokens that each is called on."""


Off = Callable[[LayerInputs, str], LayerInputs | None]
"""From inputs and their dtype, those with which a step does nothing; None where it does nothing already."""

LARGE = {"float64": 2.0**40, "float32": 2.0**20, "float16": 2.0**5, "bfloat16": 2.0**20}
"""By what tokens are multiplied, beside which the eps of a norm should be less than a rounding."""


@dataclass(frozen=True)
class Switch:
    """A step that is made to do nothing.

    Attributes:
        topic, says: the finding where the layer is right then.
        off: how it is made so.
    """

    topic: str
    says: str
    off: Off


def _without(*names: str) -> Off:
    """With weights of 0."""

    def off(inputs: LayerInputs, dtype: str) -> LayerInputs | None:
        found = {name: 0 * inputs.weights[name] for name in names if name in inputs.weights}
        return replace(inputs, weights=inputs.weights | found) if found else None

    return off


def _ones(*names: str) -> Off:
    """With weights of 1."""

    def off(inputs: LayerInputs, dtype: str) -> LayerInputs | None:
        found = {name: 0 * inputs.weights[name] + 1 for name in names if name in inputs.weights}
        return replace(inputs, weights=inputs.weights | found) if found else None

    return off


def _at_zero(inputs: LayerInputs, dtype: str) -> LayerInputs | None:
    at_zero = inputs.config.rope is None or not inputs.positions.any()
    return None if at_zero else replace(inputs, positions=0 * inputs.positions)


def _large(inputs: LayerInputs, dtype: str) -> LayerInputs | None:
    """Tokens beside which the eps of norms is nothing; what no norm follows stays as large as it is."""
    name, c, factor = "kv_a_proj_with_mqa", inputs.config.kv_lora_rank, LARGE[dtype]
    rows = inputs.weights[name].copy()
    rows[c:] /= 1.0 if inputs.config.k_pe_norm else factor
    weights = inputs.weights | {name: rows}
    if "q_proj" in weights:
        weights["q_proj"] = weights["q_proj"] / factor
    return replace(inputs, hidden=inputs.hidden * factor, weights=weights)


def _one_sequence(inputs: LayerInputs, dtype: str) -> LayerInputs | None:
    if len(inputs.hidden) == 1:
        return None
    return replace(inputs, hidden=inputs.hidden[:1], positions=inputs.positions[:1])


def _without_rope_key(inputs: LayerInputs, dtype: str) -> LayerInputs | None:
    name, c = "kv_a_proj_with_mqa", inputs.config.kv_lora_rank
    if inputs.config.qk_rope_head_dim == 0:
        return None
    weight = inputs.weights[name].copy()
    weight[c:] = 0
    return replace(inputs, weights=inputs.weights | {name: weight})


SWITCHES: tuple[Switch, ...] = (
    Switch("batch", "the first sequence alone is right", _one_sequence),
    Switch("norm", "large tokens are right, so that it is the eps of a norm", _large),
    Switch(
        "norm", "norms whose weight is 1 are right", _ones("q_a_layernorm", "kv_a_layernorm", "k_rope_only_layernorm")
    ),
    Switch("rotation", "tokens at position 0 are right, so that it is the rotation, or a position", _at_zero),
    Switch("rotation", "without the rope part of the keys the layer is right", _without_rope_key),
    Switch(
        "scores",
        "without queries the layer is right, so that it is the queries or the scores",
        _without("q_proj", "q_b_proj"),
    ),
)
"""In the order in which they are tried: the first that makes a layer right is the finest."""

STAGES = {
    "q_a_proj": "queries",
    "q_a_layernorm": "norm",
    "q_nope": "queries",
    "q_pe": "rotation",
    "kv_a_proj_with_mqa": "latent",
    "kv_a_layernorm": "norm",
    "latent": "latent",
    "k_pe": "rotation",
    "lse": "scores",
    "attention": "scores",
    "o_proj": "output",
}
"""The topic of each stage, where it is the first that is wrong."""


def layer_telltale(driver: Driver, case: LayerCase, declared: Description) -> list[Finding]:
    """Which step of a layer is wrong, and how far that is known by what."""
    layer = _Asked(driver, declared, case)
    inputs, calls = case.build(), layer.calls
    if layer.right(inputs, calls):
        return []
    found = [stage] if (stage := layer.stage(inputs, calls)) else []
    if case.steps and layer.right(inputs, [("prefill", np.s_[:])]):
        found.append(Finding("cache", "prefill of the same tokens is right, so that it is decode, or what is cached"))
    for switch in SWITCHES:
        off = switch.off(inputs, case.dtype)
        if off is not None and layer.right(off, calls):
            return [*found, Finding(switch.topic, switch.says)]
    if case.prompt + case.steps > 1 and layer.right(_first_token(inputs), [("prefill", np.s_[:])]):
        return [
            *found,
            Finding("mask", "a token alone is right, and so are its values: it is how tokens see each other"),
        ]
    return found


def _first_token(inputs: LayerInputs) -> LayerInputs:
    return replace(inputs, hidden=inputs.hidden[:, :1], positions=inputs.positions[:, :1])


class _Asked:
    """A subject that is asked for layers."""

    def __init__(self, driver: Driver, declared: Description, case: LayerCase) -> None:
        self.driver, self.profile = driver, declared.profile(case.dtype)
        chunk = ("prefill", slice(0, case.prompt))
        steps = range(case.prompt, case.prompt + case.steps)
        self.calls: Calls = [chunk, *(("decode", slice(i, i + 1)) for i in steps)]

    def right(self, inputs: LayerInputs, calls: Calls) -> bool:
        """Whether a new layer is right on these calls; not where it refuses them, or nothing can be said."""
        want, bound = layer_with_bound(inputs.hidden, inputs.positions, inputs.weights, inputs.config, self.profile)
        total = np.broadcast_to(bound.total, want.shape)
        try:
            layer = self._layer(inputs)
            for method, tokens in calls:
                got = layer.run(method, inputs.hidden[:, tokens], inputs.positions[:, tokens])
                if not (ratios(got, want[:, tokens], total[:, tokens]) <= 1).all():
                    return False
        except (NotOffered, SubjectCrashed, Unsupported, VacuousCase, Violation):
            return False
        return True

    def _layer(self, inputs: LayerInputs) -> LayerDriver:
        made: LayerDriver = there(LayerDriver.of, self.driver, inputs.weights, inputs.config)
        return made

    def stage(self, inputs: LayerInputs, calls: Calls) -> Finding | None:
        """The first stage that leaves its own bound; None of a layer that hands out none, or whose stages are all within."""
        every = bounded_stages(inputs.hidden, inputs.positions, inputs.weights, inputs.config, self.profile)
        try:
            layer = self._layer(inputs)
            for method, tokens in calls:
                stages = {name: x[..., tokens] if name == "lse" else x[:, tokens] for name, x in every.items()}
                shapes = {name: x.value.shape for name, x in stages.items()}
                got = layer.trace(method, inputs.hidden[:, tokens], inputs.positions[:, tokens], shapes)
                for name in [name for name in stages if name in got]:
                    if not (ratios(got[name], stages[name].value, stages[name].error) <= 1).all():
                        how = _how(name, got[name].value, stages[name].value, inputs, tokens)
                        text = f"the first stage that is wrong is {name} of {method}{f': it {how}' * bool(how)}"
                        return Finding(STAGES[name], text)
        except (NotOffered, SubjectCrashed, Unsupported, Violation):
            return None
        return None


def _how(name: str, got: Array, want: Array, inputs: LayerInputs, tokens: slice) -> str:
    """What a wrong stage is like, as a predicate; "" where it is like nothing known."""
    if name in ("q_pe", "k_pe") and inputs.config.rope is not None:
        return next((text for text, other in _turned(want, inputs, tokens) if _alike(got, other)), "")
    factor = float((got * want).sum() / (want * want).sum()) if want.any() else 1.0
    return f"is {factor:.4g} times what it should be" if _alike(got, factor * want) else ""


def _alike(got: Array, other: Array) -> bool:
    """Whether two stages are the same but for roundings."""
    with np.errstate(all="ignore"):
        return bool(np.abs(got - other).max(initial=0.0) <= 2.0**-7 * np.abs(other).max(initial=0.0))


def _turned(want: Array, inputs: LayerInputs, tokens: slice) -> Iterator[tuple[str, Array]]:
    """Other ways to rotate what ``want`` [b, s, (h,) r] was rotated from, each with a name."""
    rope, positions = inputs.config.rope, inputs.positions[:, tokens]
    assert rope is not None
    before = apply_rope(want, -positions, rope) / rope.cos_sin_factor**2
    yield "is not rotated", before
    yield "is rotated backwards", apply_rope(before, -positions, rope)
    yield "is rotated without the factor on cos and sin", want / rope.cos_sin_factor
    yield "is rotated twice", apply_rope(want, positions, rope)
    for step in (1, -1):
        yield f"is rotated as at positions {step:+d}", apply_rope(before, np.maximum(positions + step, 0), rope)
    yield (
        "has the pairs of the other layout",
        apply_rope(before, positions, replace(rope, interleaved=not rope.interleaved)),
    )
    yield "is rotated as at positions from 0", apply_rope(before, positions - positions[:, :1], rope)
    plain = replace(rope, yarn=None, longrope=None)
    yield "is rotated without YaRN or LongRoPE", apply_rope(before, positions, plain)
