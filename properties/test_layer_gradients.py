"""Laws of the gradients of ``layer``: autograd through prefill, to the hidden states and to every weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import EllipsisType

import numpy as np

from mla_spec.bounds.layer_backward import layer_backward_with_bound
from mla_spec.bounds.running_gradients import Gradient
from mla_spec.judging.law import Run, law
from mla_spec.operations.layer_gradients import LayerGradientCase, LayerGradientDriver, LayerGradientInputs
from mla_spec.properties.attention import needs_several_sequences
from mla_spec.properties.hazards import require_unmodified
from mla_spec.properties.strategies.layer_gradients import layer_gradient_cases, many_of_each
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.formats import format_of
from mla_spec.reference.layer_backward import layer_backward
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Result, computed
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports

LAYER = ("layer",)


def _needs_gradients(supports: Supports) -> str:
    return "" if supports.may_differentiate("layer") else "no gradients flow through its layer"


def _needs_several(supports: Supports) -> str:
    return _needs_gradients(supports) or needs_several_sequences(supports)


@dataclass(frozen=True)
class Part:
    """Rows of a parameter that are judged by themselves, lest a loose bound of others hide them."""

    name: str
    rows: IntArray | EllipsisType = ...
    label: str = ""

    @property
    def title(self) -> str:
        return self.name + (f", {self.label} rows" if self.label else "")

    def of(self, result: Result) -> Result:
        """These rows of the gradient."""
        return replace(result[self.rows], what=f"gradient of {self.title}")


def parts(config: MLAConfig, names: tuple[str, ...]) -> Iterator[Part]:
    """What is judged by itself: each weight, or each kind of rows of weights that have several, and last hidden."""
    h, n, c = config.num_heads, config.qk_nope_head_dim, config.kv_lora_rank
    for name in (*names, "hidden"):
        if name in ("q_proj", "q_b_proj"):
            rows = np.arange(h * config.qk_head_dim).reshape(h, -1)
            yield Part(name, rows[:, :n].ravel(), "nope")
            yield Part(name, rows[:, n:].ravel(), "rope")
        elif name == "kv_a_proj_with_mqa":
            yield Part(name, np.arange(c), "latent")
            yield Part(name, np.arange(c, config.cache_dim), "rope")
        elif name == "kv_b_proj":
            rows = np.arange(h * (n + config.v_head_dim)).reshape(h, -1)
            yield Part(name, rows[:, :n].ravel(), "key")
            yield Part(name, rows[:, n:].ravel(), "value")
        else:
            yield Part(name)


LOOSE = {
    "float16": ("q_a_layernorm", "kv_b_proj, key rows"),
    "bfloat16": (
        "hidden",
        "q_a_proj",
        "q_a_layernorm",
        *(f"{name}, {rows} rows" for name in ("q_proj", "q_b_proj") for rows in ("nope", "rope")),
        "kv_a_proj_with_mqa, rope rows",
        "kv_b_proj, key rows",
    ),
}
"""Parts that are judged, but whose bound is not asked to be meaningful.

All of them lie behind the scores, hidden in part. A gradient that has passed them has been rounded some thirty times, and
softmax and RMSNorm have subtracted from it what is nearly as large. In bfloat16, where each rounding costs up to 2^-8, the
median bound of key rows, of the rope rows of kv_a_proj_with_mqa and of q_a_layernorm is 10 to 50 % of the gradient, that of the
others 2 to 10 %; in float16 that of the two named is 3 to 8 %. The same parts are judged in float32 and float64, and there the
bound must be meaningful.
"""


def _gradients(run: Run, inputs: LayerGradientInputs) -> dict[str, Result]:
    found: dict[str, Result] = there(LayerGradientDriver, run.driver).gradients(inputs)
    return found


def _expected(run: Run, inputs: LayerGradientInputs) -> dict[str, Gradient]:
    layer = inputs.layer
    hidden, weights = layer_backward_with_bound(
        layer.hidden, layer.positions, layer.weights, layer.config, inputs.out_grad, run.profile
    )
    return {"hidden": hidden, **weights}


def _parts(inputs: LayerGradientInputs) -> Iterator[Part]:
    return parts(inputs.layer.config, tuple(inputs.layer.weights))


@law(needs=LAYER, cases=layer_gradient_cases, missing=_needs_gradients, cost=2, first=many_of_each)
def test_layer_gradients_agree_with_reference(run: Run, case: LayerGradientCase) -> None:
    """Gradients of hidden and of each weight, each kind of rows by itself, within the worst-case bound of the profile."""
    inputs = case.build_gradient()
    _judge(run, case, inputs, _gradients(run, inputs))


def _judge(run: Run, case: LayerGradientCase, inputs: LayerGradientInputs, got: dict[str, Result]) -> None:
    """Judge the gradients that there are, part by part."""
    want = _expected(run, inputs)
    for part in _parts(inputs):
        if part.name in got:
            value, bound = want[part.name]
            gate = part.title not in LOOSE.get(case.dtype, ())
            run.within(part.of(got[part.name]), value[part.rows], bound[part.rows], gate=gate)


@law(needs=LAYER, cases=layer_gradient_cases, missing=_needs_gradients, cost=2)
def test_layer_gradients_beside_frozen_weights(run: Run, case: LayerGradientCase) -> None:
    """Where hidden or one weight alone requires a gradient, it gets what it gets where all do."""
    inputs = case.build_gradient()
    names = ("hidden", *inputs.layer.weights)
    got = there(LayerGradientDriver, run.driver).gradients(inputs, names=(names[case.seed % len(names)],))
    _judge(run, case, inputs, got)


@law(needs=LAYER, cases=layer_gradient_cases, missing=_needs_gradients)
def test_every_weight_gets_a_gradient(run: Run, case: LayerGradientCase) -> None:
    """No weight, and no kind of rows of one, is left without a gradient or with zeros where the reference has none."""
    inputs = case.build_gradient()
    got, layer = _gradients(run, inputs), inputs.layer
    hidden, weights = layer_backward(layer.hidden, layer.positions, layer.weights, layer.config, inputs.out_grad)
    want = {"hidden": hidden, **weights}
    least = max(format_of(case.dtype).smallest_normal, 2.0**-40)  # what is smaller the reference's own rounding may be
    for part in _parts(inputs):
        size = np.abs(want[part.name][part.rows]).max(initial=0.0)
        given = part.of(got[part.name])
        run.require(
            size < least or bool(given.value.any()),
            f"{given.what}: all of its elements are 0, the largest should be {size:.3g}",
        )


@law(needs=LAYER, cases=layer_gradient_cases, missing=_needs_gradients, cost=2)
def test_layer_backward_is_repeatable(run: Run, case: LayerGradientCase) -> None:
    """The same layer and tokens, differentiated again, give the same bits: nothing is left of the first time."""
    inputs = case.build_gradient()
    first, second = _gradients(run, inputs), _gradients(run, inputs)
    for name, gradient in first.items():
        run.same_bits(second[name], gradient, "a second backward pass had the same weights, tokens and gradients")


@law(needs=LAYER, cases=layer_gradient_cases, missing=_needs_gradients, cost=2)
def test_layer_backward_does_not_modify_its_inputs(run: Run, case: LayerGradientCase) -> None:
    """Neither weights, hidden states nor the gradient that arrives have changed after a backward pass."""
    inputs, driver = case.build_gradient(), there(LayerGradientDriver, run.driver)
    tensors = driver.tensors(inputs)
    require_unmodified(run, "backward through layer", tensors, lambda: driver.gradients(inputs, tensors))


@law(needs=LAYER, cases=narrowed(layer_gradient_cases, min_batch=2), missing=_needs_several, cost=4)
def test_gradients_of_a_batch_add_up(run: Run, case: LayerGradientCase) -> None:
    """A batch gives each weight the sum of what its sequences give it alone, and each token what it gets alone."""
    inputs = case.build_gradient()
    want, whole = _expected(run, inputs), _gradients(run, inputs)
    alone = [_gradients(run, _sequence(inputs, i)) for i in range(case.batch)]
    for part in _parts(inputs):
        values: list[Array] = [part.of(gradients[part.name]).value for gradients in alone]
        total = np.concatenate(values) if part.name == "hidden" else np.sum(values, axis=0)
        got, bound = part.of(whole[part.name]), want[part.name][1][part.rows]
        run.same_function(
            computed(total, got.what), got, bound, f"{part.title}: the sequences alone give something else"
        )


def _sequence(inputs: LayerGradientInputs, i: int) -> LayerGradientInputs:
    """Sequence i of the batch alone."""
    one = slice(i, i + 1)
    layer = replace(inputs.layer, hidden=inputs.layer.hidden[one], positions=inputs.layer.positions[one])
    return LayerGradientInputs(layer, inputs.out_grad[one])
