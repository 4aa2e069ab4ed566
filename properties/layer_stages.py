"""The stages that a layer hands out with ``trace``, each beside its own bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.layer import bounded_stages
from mla_spec.judging.judge import judge_within
from mla_spec.judging.law import Run
from mla_spec.operations.layer import LayerDriver, LayerInputs
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result
from mla_spec.subjects.near import there
from mla_spec.subjects.violation import NotOffered, SubjectCrashed, Unsupported, Violation

Calls = list[tuple[str, slice]]
"""Methods, and the tokens that each is called on."""


def made_layer(run: Run, inputs: LayerInputs) -> LayerDriver:
    """A new layer of the subject."""
    made: LayerDriver = there(LayerDriver.of, run.driver, inputs.weights, inputs.config)
    return made


def traced(run: Run, inputs: LayerInputs, calls: Calls) -> Iterator[tuple[Result, Array, ErrorBound]]:
    """What a new layer hands out of each call, its value and its own bound, in the order of computation."""
    layer = made_layer(run, inputs)
    every = bounded_stages(inputs.hidden, inputs.positions, inputs.weights, inputs.config, run.profile)
    for method, tokens in calls:
        stages = {name: x[..., tokens] if name == "lse" else x[:, tokens] for name, x in every.items()}
        shapes = {name: x.value.shape for name, x in stages.items()}
        got = layer.trace(method, inputs.hidden[:, tokens], inputs.positions[:, tokens], shapes)
        for name in [name for name in stages if name in got]:
            yield got[name], stages[name].value, ErrorBound({f"roundings up to {name}": stages[name].error})


def _first_wrong_stage(run: Run, inputs: LayerInputs, calls: Calls) -> str:
    """The first stage of these calls that leaves its bound, in a sentence; "" of a layer that cannot hand out any."""
    try:
        for got, want, bound in traced(run, inputs, calls):
            judge_within(got, want, bound, gate=False)
    except (NotOffered, Unsupported, SubjectCrashed):  # which must not replace what is known to be wrong
        return ""
    except Violation as violation:
        return f"the first stage that leaves its own bound: {violation}"
    return "every stage that the layer hands out is within its own bound"


@contextmanager
def stage_named(run: Run, inputs: LayerInputs, calls: Calls) -> Iterator[None]:
    """Add to what is wrong with the outputs of these calls which stage is the first to be."""
    try:
        yield
    except Violation as violation:
        stage = _first_wrong_stage(run, inputs, calls)
        raise Violation(f"{violation}\n{stage}" if stage else str(violation)) from None
