"""Laws of the operation ``dequantize_weight``: block-quantised weights, and layers of them."""

from __future__ import annotations

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.judging.law import Run, law
from mla_spec.operations.dequantize_weight import OPERATION as WEIGHT
from mla_spec.operations.dequantize_weight import QuantisedLayerCase, WeightCase, layer_of_dequantised
from mla_spec.properties.strategies.dequantize_weight import quantised_layer_cases, weight_cases


@law(needs=WEIGHT, cases=weight_cases)
def test_dequantised_weight_is_code_times_scale_of_its_block(run: Run, case: WeightCase) -> None:
    """Each element is its code times its block's scale, rounded to the dtype; exactly where the dtype holds it."""
    inputs = case.build()
    run.agrees(WEIGHT, inputs, run.call(WEIGHT, inputs))


@law(needs=(WEIGHT, "layer"), cases=quantised_layer_cases, cost=2)
def test_layer_of_dequantised_weights(run: Run, case: QuantisedLayerCase) -> None:
    """A layer of weights as the subject dequantised them agrees with the reference of their exact values."""
    inputs = case.build_quantised()
    hidden, positions = inputs.layer.hidden, inputs.layer.positions
    want, bound = layer_with_bound(hidden, positions, inputs.layer.weights, inputs.layer.config, run.profile)
    got = layer_of_dequantised(run.driver, inputs).run("prefill", hidden, positions)
    run.within(got, want, bound)
