"""Hazards: what can go wrong with any call, whatever it computes. Each is stated once, for every operation.

``LAWS`` is the product of the hazards and the operations. What is left out of it stands in ``EXCEPTIONS``, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.judge import changed
from mla_spec.judging.law import CaseSource, Law, Live, Run
from mla_spec.operations.all import CALLED
from mla_spec.operations.gradients import Branched, Gradients
from mla_spec.operations.operation import Operation
from mla_spec.properties.cases import CASES
from mla_spec.properties.far import far_apart, left_out_where_too_large
from mla_spec.properties.fixed.options import with_all_options
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.subjects.driver import Driver, Results, Tensors, is_tensor, tensor_bits
from mla_spec.subjects.memory import at_the_end, filled_memory_of_any_device, ordinary_memory, share_memory
from mla_spec.subjects.near import near, there
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

REPETITIONS = 4
"""Calls whose bits must agree."""

MORE_REPETITIONS = 28
"""Calls that say how often they do not."""


def leaves_its_arguments_alone(operation: Operation, run: Run, case: Any) -> None:
    """No argument has changed when the call returns, but those that it is there to write."""
    inputs = operation.build(case)
    tensors = run.driver.tensors(operation, inputs)
    kept = {name: x for name, x in tensors.items() if name not in operation.written}
    require_unmodified(run, operation.name, kept, lambda: run.driver.raw(operation, inputs, tensors))


def require_unmodified(run: Run, operation: str, tensors: Tensors, call: Callable[[], Any]) -> None:
    """Raise Violation if ``call`` changes one of ``tensors``."""
    before = {name: tensor_bits(x) for name, x in tensors.items()}
    call()
    for name, x in tensors.items():
        after = tensor_bits(x)
        run.require(
            after.shape == before[name].shape,
            f"{operation} changed the shape of its argument {name} from {list(before[name].shape)} to {list(after.shape)}",
        )
        changed = int((after != before[name]).sum())
        run.require(changed == 0, f"{operation} changed {changed} of {x.numel()} elements of its argument {name}")


def require_backward_unmodified(run: Run, operation: str, tensors: Tensors, call: Callable[[], Branched]) -> Gradients:
    """The gradients; Violation if the backward pass changes an argument, out, or the gradient that another branch gets."""
    done: list[Branched] = []
    require_unmodified(run, f"the backward pass of {operation}", tensors, lambda: done.append(call()))
    (left,) = done
    run.require(bool((tensor_bits(left.out) == left.before).all()), f"the backward pass changed the out of {operation}")
    changed = int((tensor_bits(left.branch) != tensor_bits(tensors["out_grad"])).sum())
    run.require(
        changed == 0, f"a branch added to out got another gradient in {changed} of {left.branch.numel()} elements"
    )
    return left.gradients


def owns_its_outputs(operation: Operation, run: Run, case: Any) -> None:
    """Outputs share no memory with arguments, and the next calls leave them as they are."""
    first, others = operation.build(case), operation.others(case)
    calls = [(inputs, run.driver.tensors(operation, inputs)) for inputs in (first, *others, others[-1])]
    returned = [run.driver.raw(operation, inputs, tensors) for inputs, tensors in calls[:1]]
    bits = [tensor_bits(x) if is_tensor(x) else None for x in returned[0]]
    returned += [run.driver.raw(operation, inputs, tensors) for inputs, tensors in calls[1:]]
    for i, output in enumerate(operation.outputs):
        x = returned[0][i]
        if not is_tensor(x) or output.name in operation.written:
            continue
        what = output.what or output.name
        for name, y in calls[0][1].items():
            run.require(output.view or not share_memory(x, y), f"{what} shares memory with argument {name}")
        for later in returned[1:]:
            shared = share_memory(x, later[i]) and not output.view
            run.require(not shared, f"{what} shares memory with {what} of a later call")
        changed = int((tensor_bits(x) != bits[i]).sum())
        run.require(changed == 0, f"later calls changed {changed} of {x.numel()} elements of {what}")


def starts_anew(operation: Operation, run: Run, case: Any) -> None:
    """Nothing of a call (lengths, tables, values, scales, masks) lives on in the next one with the same shapes."""
    first, (other, *rest) = operation.build(case), operation.others(case)
    for inputs in (other, first, *rest, *_unmasked(operation, run, case)):
        run.agrees(operation, inputs, run.call(operation, inputs))


def _unmasked(operation: Operation, run: Run, case: Any) -> tuple[Any, ...]:
    """The call of a causal case without the mask, where the subject can leave it out."""
    leaves_out = getattr(case, "causal", False) and False in run.supports.causal
    return (operation.build(replace(case, causal=False)),) if leaves_out else ()


def reads_its_tensors_anew(operation: Operation, run: Run, case: Any) -> None:
    """Other contents in the same tensors, written as kernels write, give what they should."""
    first = operation.build(case)
    tensors = run.driver.tensors(operation, first)
    run.driver.raw(operation, first, tensors)
    for inputs in (*operation.others(case), first):
        overwrite(tensors, run.driver.tensors(operation, inputs))
        run.agrees(operation, inputs, run.call(operation, inputs, tensors))


@near
def overwrite(tensors: Tensors, contents: Tensors) -> None:
    """Other contents for the same tensors. Autograd's version counters do not see it, as they do not see a kernel."""
    for name, x in tensors.items():
        x.data.copy_(contents[name])


def reads_strides(operation: Operation, run: Run, case: Any) -> None:
    """Views of larger or transposed tensors are read by their strides."""
    inputs = operation.build(case)
    wanted = run.expected(operation, inputs)
    for name, view in operation.all_views.items():
        with Told(f"with {name}"):
            got = run.call(operation, inputs, view(run.driver.tensors(operation, inputs)))
            run.agrees(operation, inputs, got, wanted)


def reaches_far(operation: Operation, run: Run, case: Any) -> None:
    """Arguments whose offsets exceed 2^31, and 2^32, elements are read as any other."""
    inputs = operation.distant(case)
    wanted = run.expected(operation, inputs)
    for argument in operation.arguments:
        tensors = run.driver.tensors(operation, inputs)
        if argument.far and tensors[argument.name][0].numel():
            told = Told(f"with elements of the first axis of {argument.name} more than 2^31 elements apart")
            with left_out_where_too_large(run, argument.name), told:
                # Without a name of its own, a distant tensor is gone before the next one is made.
                far = partial(far_apart, tensors[argument.name], wait=not run.left_out)
                run.agrees(operation, inputs, run.call(operation, inputs, tensors | {argument.name: far()}), wanted)


def writes_all_of_its_outputs(operation: Operation, run: Run, case: Any) -> None:
    """Every element of every output is written: memory that torch hands out uninitialized holds NaN."""
    inputs = operation.build(case)
    run.agrees(operation, inputs, _call_in(filled_memory_of_any_device, run, operation, inputs))


def gives_the_same_bits_again(operation: Operation, run: Run, case: Any) -> None:
    """The same call, many times, gives the same bits, unless the profile says that it is not deterministic."""
    inputs = operation.build(case)

    def again(times: int) -> list[Results]:
        return [_call_in(ordinary_memory, run, operation, inputs) for _ in range(times)]

    first, *others = again(REPETITIONS)
    if not run.profile.deterministic:
        wanted = run.expected(operation, inputs)
        for got in others:
            run.agrees(operation, inputs, got, wanted)
        return
    if any(_changes(got, first) for got in others):
        others += again(MORE_REPETITIONS)
    for got in others:
        run.same(got, first, f"the same call was made again; {_how_often(others, first)}")


def _changes(got: Results, first: Results) -> list[tuple[float, str]]:
    """By how much each output whose bits have changed did so, and its name."""
    pairs = [(a, b, changed(a, b)) for a, b in zip(got, first, strict=True) if a is not None and b is not None]
    with np.errstate(invalid="ignore"):  # infinities may have changed too
        return [(float(np.abs(a.value - b.value)[where].max()), a.what) for a, b, where in pairs if where.any()]


def _how_often(others: list[Results], first: Results) -> str:
    """How many repetitions of a call differ from the first one, and by how much at most."""
    changes = [found for got in others if (found := _changes(got, first))]
    if not changes:
        return "no repetition differs from the first"
    most, what = max(change for found in changes for change in found)
    return f"{len(changes)} of {len(others)} repetitions differ from the first, by up to {most:.3g} in {what}"


def _call_in(context: Callable[[], Any], run: Run, operation: Operation, inputs: Any) -> Results:
    """The outputs of a call made where ``context`` holds."""
    tensors = there(_tensors_in, run.driver, operation, operation.asked(inputs, shapes=False), context)
    results: Results = there(
        _called_in, run.driver, operation, operation.asked(inputs, tensors=False), tensors, context
    )
    return results


def _tensors_in(driver: Driver, operation: Operation, inputs: Any, context: Callable[[], Any]) -> Tensors:
    with context():
        return driver.tensors(operation, inputs)


def _called_in(
    driver: Driver, operation: Operation, inputs: Any, tensors: Tensors, context: Callable[[], Any]
) -> Results:
    with context():
        return driver.call(operation, inputs, tensors)


def stays_within_memory(operation: Operation, run: Run, case: Any) -> None:
    """Arguments without a spare page or column, which end where memory ends, are read to their end and no further."""
    inputs = operation.tight(operation.build(case))
    tensors = {name: at_the_end(x, guarded=run.isolated) for name, x in run.driver.tensors(operation, inputs).items()}
    run.agrees(operation, inputs, run.call(operation, inputs, tensors))


class Told:
    """A context in which a violation is told with the circumstances."""

    def __init__(self, circumstances: str) -> None:
        self.circumstances = circumstances

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Violation):
            raise Violation(f"{self.circumstances}:\n{error}") from None


@dataclass(frozen=True)
class Hazard:
    """One thing that can go wrong with any call.

    Attributes:
        name: what the names of its laws end with, after the operation.
        check: (operation, run, case) -> None; raises Violation. Its docstring is the statement.
        cost: as of a law.
        live: as of a law.
        several: whether cases should have two sequences or more, so that lengths can be permuted.
    """

    name: str
    check: Callable[[Operation, Run, Any], None]
    cost: int
    live: Live
    several: bool = False


HAZARDS = (
    Hazard("does_not_modify_its_inputs", leaves_its_arguments_alone, 2, "tensors"),
    Hazard("output_is_not_aliased", owns_its_outputs, 4, "tensors"),
    Hazard("calls_are_independent", starts_anew, 4, "calls", several=True),
    Hazard("reads_its_tensors_anew", reads_its_tensors_anew, 4, "tensors", several=True),
    Hazard("reads_strides", reads_strides, 4, "tensors"),
    Hazard("reaches_beyond_2_31_elements", reaches_far, 8, "tensors"),
    Hazard("writes_all_of_its_outputs", writes_all_of_its_outputs, 4, "tensors"),
    Hazard("gives_the_same_bits_again", gives_the_same_bits_again, 4, "calls"),
    Hazard("stays_within_memory", stays_within_memory, 4, "tensors"),
)

SEVERAL: dict[str, dict[str, Any]] = {
    "prefill": {"min_batch": 2},
    "decode": {"min_batch": 2},
    "ragged_decode": {"min_batch": 2},
    "rank_decode": {"min_batch": 2},
    "decode_quantized": {"min_batch": 2},
    "indexer": {"min_batch": 2},
}
"""What makes the strategy of an operation draw several sequences."""

STATED_ELSEWHERE = {
    ("write_cache", "calls_are_independent"): "test_write_cache.py writes into one pool twice, and looks at all of it",
    ("write_cache", "reads_strides"): "test_write_cache.py also looks at what lies between the rows of the pool",
    ("write_cache", "reaches_beyond_2_31_elements"): "test_write_cache.py also looks at the rest of the distant pool",
    ("merge", "calls_are_independent"): "test_merge.py also merges fewer parts",
}
"""Cells whose law is written by hand, because it asks for more than the hazard does."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("write_cache", "output_is_not_aliased"): "it returns nothing",
    ("write_cache", "writes_all_of_its_outputs"): "it returns nothing; which slots it writes has laws of its own",
}
"""Cells without a law, and why there can be none."""


def hazard_law(operation: Operation, hazard: Hazard) -> Law:
    """The law that an operation is free of a hazard."""
    check = partial(hazard.check, operation)
    check.__doc__ = hazard.check.__doc__
    strategy = CASES[operation.name].drawn
    cases: CaseSource = (
        narrowed(strategy, **SEVERAL[operation.name]) if (hazard.several and operation.name in SEVERAL) else strategy
    )
    name = f"test_{operation.name}_{hazard.name}"
    return Law(
        name,
        (operation.name,),
        cases,
        check,
        operation.missing,
        cost=hazard.cost,
        first=partial(_first, operation.name),
        live=hazard.live,
    )


def _first(operation: str, supports: Supports, profile: Profile) -> list[Any]:
    """Ordinary cases, and one with the options that the subject takes."""
    cases = CASES[operation].ordinary(supports, profile)
    return [*cases, *with_all_options(operation, cases, supports)]


def _laws() -> Iterator[Law]:
    for hazard in HAZARDS:
        for operation in CALLED:
            if (operation.name, hazard.name) not in STATED_ELSEWHERE | EXCEPTIONS:
                yield hazard_law(operation, hazard)


LAWS = tuple(_laws())
