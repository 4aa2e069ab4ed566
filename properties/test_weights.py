"""Laws of the operation ``dequantize_weight``: block-quantised weights, and layers of them."""

from __future__ import annotations

from dataclasses import replace

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.judging.law import Run, law
from mla_spec.operations.dequantize_weight import QuantisedLayerCase, WeightCase
from mla_spec.operations.weight_driver import WeightDriver
from mla_spec.properties.expected import dequantised_error
from mla_spec.properties.memory import require_unmodified
from mla_spec.properties.strategies.dequantize_weight import quantised_layer_cases, weight_cases
from mla_spec.subjects.views import WEIGHT_VIEWS
from mla_spec.subjects.violation import Violation

WEIGHT = ("dequantize_weight",)


@law(needs=WEIGHT, cases=weight_cases)
def test_dequantised_weight_is_code_times_scale_of_its_block(run: Run, case: WeightCase) -> None:
    """Each element is its code times its block's scale, rounded to the dtype; exactly where the dtype holds it."""
    inputs = case.build()
    got = WeightDriver(run.driver).call(inputs)
    run.within(got, inputs.weight, dequantised_error(inputs.weight, run.profile), gate=False)


@law(needs=WEIGHT, cases=weight_cases)
def test_dequantize_weight_reads_strides(run: Run, case: WeightCase) -> None:
    """Codes and scales that are views of larger or transposed tensors are read by their strides."""
    inputs = case.build()
    driver, bound = WeightDriver(run.driver), dequantised_error(inputs.weight, run.profile)
    for name, view in WEIGHT_VIEWS.items():
        try:
            run.within(driver.call(inputs, view(driver.tensors(inputs))), inputs.weight, bound, gate=False)
        except Violation as violation:
            raise Violation(f"with {name}:\n{violation}") from None


@law(needs=WEIGHT, cases=weight_cases)
def test_dequantize_weight_does_not_modify_its_inputs(run: Run, case: WeightCase) -> None:
    """No argument has changed when dequantize_weight returns."""
    inputs = case.build()
    driver = WeightDriver(run.driver)
    tensors = driver.tensors(inputs)
    require_unmodified(run, "dequantize_weight", tensors, lambda: driver.call(inputs, tensors))


@law(needs=WEIGHT, cases=weight_cases)
def test_dequantize_weight_calls_are_independent(run: Run, case: WeightCase) -> None:
    """Nothing of a call (codes, scales) lives on in the next one with the same shapes."""
    for this in (case, replace(case, seed=case.seed + 1), case):
        inputs = this.build()
        got = WeightDriver(run.driver).call(inputs)
        run.within(got, inputs.weight, dequantised_error(inputs.weight, run.profile), gate=False)


@law(needs=(*WEIGHT, "layer"), cases=quantised_layer_cases, cost=2)
def test_layer_of_dequantised_weights(run: Run, case: QuantisedLayerCase) -> None:
    """A layer of weights as the subject dequantised them agrees with the reference of their exact values."""
    inputs = case.build_quantised()
    hidden, positions = inputs.layer.hidden, inputs.layer.positions
    want, bound = layer_with_bound(hidden, positions, inputs.layer.weights, inputs.layer.config, run.profile)
    got = WeightDriver(run.driver).layer(inputs).run("prefill", hidden, positions)
    run.within(got, want, bound)
