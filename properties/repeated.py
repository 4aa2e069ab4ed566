"""Calls whose inputs are the same few over and over, so that what few give says what all must give."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mla_spec.judging.law import Run
from mla_spec.operations.operation import Operation
from mla_spec.properties.hazards import Told
from mla_spec.subjects.near import near

JUDGED = 4
"""Of the parts that differ from the first in any bit, so many first and last ones are judged."""


def judge_repeated(run: Run, operation: Operation, inputs: Any, argument: str, times: int, axis: int = 0) -> None:
    """Call an operation of one output with ``argument`` repeated, and judge the parts of out as outputs of ``inputs``.

    Parts that equal the first bit for bit need no judging of their own. Others may be as right.
    """
    tensors = run.driver.tensors(operation, inputs)
    (out,) = run.driver.raw(operation, inputs, tensors | {argument: _repeated(tensors[argument], times, axis)})
    length, name = operation.outputs[0].shape(inputs)[axis], operation.outputs[0].name
    shape = tuple(out.shape)
    run.require(
        len(shape) > axis and shape[axis] == times * length,
        f"{name} has shape {list(shape)}, want {times * length} on axis {axis}",
    )
    for i in (0, *_unlike_the_first(out, length, axis)):
        with Told(f"with {argument} repeated {times} times, in part {i} of {name}"):
            run.agrees(operation, inputs, run.driver.read(operation, inputs, (_part(out, i, length, axis),)))


@near
def _repeated(x: Tensor, times: int, axis: int) -> Tensor:
    return x.repeat(*[times if i == axis else 1 for i in range(x.dim())])


@near
def _part(x: Tensor, i: int, length: int, axis: int) -> Tensor:
    return x.narrow(axis, i * length, length)


@near
def _unlike_the_first(x: Tensor, length: int, axis: int) -> list[int]:
    """The first and the last parts of so many elements that differ from part 0; NaN differs from NaN."""
    parts = x.movedim(axis, 0)
    parts = parts.reshape(-1, length, *parts.shape[1:])
    unlike: list[int] = (parts != parts[:1]).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return unlike[:JUDGED] + unlike[JUDGED:][-JUDGED:]
