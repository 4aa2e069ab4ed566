"""Laws of hazards see every argument: a fault in the one alone fails, whatever the others hide."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import CALLED
from mla_spec.operations.operation import Operation
from mla_spec.properties.cases import CASES
from mla_spec.subjects.contract import profile_of
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.memory import share_memory

Fault = Callable[[dict[Any, Any], Tensor], Tensor]
"""From what the subject keeps and an argument, what is computed with instead."""


def kept_by_address(kept: dict[Any, Any], x: Tensor) -> Tensor:
    """A copy, as long as address and autograd's version stay the same."""
    key = x.data_ptr(), x._version, tuple(x.shape), x.dtype
    copy: Tensor = kept.setdefault(key, (x.clone(), x))[0]
    return copy


def overwritten(kept: dict[Any, Any], x: Tensor) -> Tensor:
    """A copy, while the memory of the argument is used for something else."""
    copy = x.clone()
    x.data.view(torch.uint8).fill_(1)
    return copy


def from_the_start(kept: dict[Any, Any], x: Tensor) -> Tensor:
    """What lies where the memory begins."""
    return x.as_strided(x.shape, x.stride(), 0)


def with_offsets_of(bits: int) -> Fault:
    """Rows at offsets of so many bits, without sign."""

    def read(kept: dict[Any, Any], x: Tensor) -> Tensor:
        offsets = [x.storage_offset() + i * x.stride(0) % 2**bits for i in range(len(x))]
        return torch.stack([x.as_strided(x.shape[1:], x.stride()[1:], offset) for offset in offsets])

    return read


FAULTS: dict[str, Fault] = {
    "reads_its_tensors_anew": kept_by_address,
    "does_not_modify_its_inputs": overwritten,
    "reads_strides": from_the_start,
    "reaches_beyond_2_31_elements": with_offsets_of(32),
}


def tensor_names(operation: Operation) -> list[str]:
    """The tensor arguments, those of a dict by "argument.key"."""
    case = CASES[operation.name].ordinary(TorchAbsorbed.supports, profile_of(TorchAbsorbed(), "float32"))[0]
    return list(Driver(TorchAbsorbed(), "float32").tensors(operation, operation.build(case)))


def faulty(operation: Operation, name: str, fault: Fault) -> Any:
    """The correct subject, but for one argument of one operation."""
    argument, _, key = name.partition(".")
    places = [each.name for each in operation.arguments if not each.optional]
    kept: dict[Any, Any] = {}

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        given = dict(zip(places, arguments, strict=True)) | options
        if key:
            given[argument] = given[argument] | {key: fault(kept, given[argument][key])}
        elif argument in given:
            given[argument] = fault(kept, given[argument])
        rest = {option: value for option, value in given.items() if option not in places}
        return getattr(TorchAbsorbed, operation.name)(self, *(given[place] for place in places), **rest)

    return type("Faulty", (TorchAbsorbed,), {operation.name: call, "name": "faulty"})()


def _cells() -> list[tuple[str, Operation, str]]:
    return [
        (hazard, operation, name)
        for hazard in FAULTS
        for operation in CALLED
        for name in tensor_names(operation)
        for argument in operation.arguments
        if argument.name == name.partition(".")[0] and not argument.written
        if argument.far or hazard != "reaches_beyond_2_31_elements"
    ]


@pytest.mark.parametrize(("hazard", "operation", "name"), _cells(), ids=lambda x: getattr(x, "name", x))
def test_a_fault_in_one_argument_fails(hazard: str, operation: Operation, name: str) -> None:
    """The first few cases suffice: the law does not depend on what is drawn."""
    law = all_laws()[f"test_{operation.name}_{hazard}"]
    options = Options(examples=8, dtypes=("float32",), minimise=False)
    record = run_law(law, faulty(operation, name, FAULTS[hazard]), options)
    assert record.verdict in ("fail", "crashed"), record.text()


def test_memory_is_shared_where_storages_overlap() -> None:
    """Two tensors of one buffer, each with a storage of its own."""
    buffer = bytearray(256)
    x = torch.frombuffer(buffer, dtype=torch.float32, count=16, offset=0)
    overlapping = torch.frombuffer(buffer, dtype=torch.float32, count=16, offset=60)
    behind = torch.frombuffer(buffer, dtype=torch.float32, count=16, offset=64)
    assert share_memory(x, overlapping)
    assert share_memory(overlapping, x)
    assert not share_memory(x, behind)
    assert not share_memory(behind, x)
    assert share_memory(overlapping, behind)


class EveryFourthCall(TorchAbsorbed):
    """Every fourth result is one unit in the last place larger."""

    def __init__(self) -> None:
        self.calls = 0

    def rope(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out = super().rope(x, *arguments, **options)
        self.calls += 1
        return out if self.calls % 4 else torch.nextafter(out, torch.full_like(out, torch.inf))


def test_a_result_that_changes_is_told_with_how_often_and_how_far() -> None:
    law = all_laws()["test_rope_gives_the_same_bits_again"]
    record = run_law(law, EveryFourthCall(), Options(examples=4, seed=0, dtypes=("float32",)))
    assert record.verdict == "fail"
    told = re.search(r"(\d+) of 31 repetitions differ from the first, by up to (\S+) in \S+", record.message)
    assert told is not None, record.message
    assert int(told[1]) in (7, 8)
    assert float(told[2]) > 0
