"""The law of CUDA graphs, with a graph of operations on the CPU in place of one on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options, Run
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.operations.decode import DecodeCase
from mla_spec.planted_bugs.state import Capturable, LengthsOfFirstCall
from mla_spec.proof.selftest import BugResult, Matrix
from mla_spec.properties.test_cuda_graph import judge_replays
from mla_spec.subjects.supports import Supports

LAW = all_laws()["test_decode_is_replayed_in_a_cuda_graph"]


class Recorder(TorchDispatchMode):
    """Keeps every operation on tensors, to run it again on the same memory; numbers of the host stay what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or changed in place
                    old.copy_(new)


def recorded(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """As ``captured``: warm up, record, and replay."""
    call()
    with Recorder() as graph:
        returned = call()

    def replay() -> Any:
        graph.replay()
        return returned

    return replay


def record_of(subject: object) -> Record:
    def check(run: Run, case: DecodeCase) -> None:
        judge_replays(run, case, recorded)

    return run_law(replace(LAW, check=check, unavailable=lambda options: ""), subject, Options())


def test_a_subject_that_never_waits_is_replayed() -> None:
    record = record_of(Capturable())
    assert record.verdict == "pass", record.text()
    assert record.cases >= Options().count


def test_lengths_kept_from_the_warm_up_are_found() -> None:
    record = record_of(LengthsOfFirstCall())
    assert record.verdict == "fail"
    assert "exceeds the bound" in record.message


def test_lengths_of_the_host_are_found() -> None:
    class HostLengths(Capturable):
        """The number of keys is read when the call is recorded, from a copy on the host."""

        name = "host-lengths"

        def key_count(self, block_table: torch.Tensor, cache_seqlens: torch.Tensor, page_size: int) -> int:
            return int(cache_seqlens.numpy().max())

    assert record_of(HostLengths()).verdict == "fail"


def test_what_waits_for_the_device_cannot_be_captured() -> None:
    class Waits(TorchAbsorbed):
        supports = Supports(cuda_graphs=True)

    record = record_of(Waits())
    assert record.verdict == "crashed"
    assert "not permitted when stream is capturing" in record.message


@pytest.mark.parametrize(
    ("subject", "device", "message"),
    [
        (Capturable(), "cpu", "needs a CUDA device: --device cuda"),
        (TorchAbsorbed(), "cuda", "does not declare cuda_graphs"),
    ],
)
def test_where_it_cannot_be_run_it_says_so(subject: object, device: str, message: str) -> None:
    record = run_law(LAW, subject, Options(device=device))
    assert (record.verdict, record.message) == ("unsupported", message)


def test_a_law_that_could_not_run_is_not_idle() -> None:
    ran = BugResult("P", "symptom", (Record(LAW.name, "P", "pass", 1),))
    assert LAW.name in Matrix((ran,), complete=True).idle_laws
    assert LAW.name not in Matrix((), complete=True).idle_laws
