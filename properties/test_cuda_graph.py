"""Law of ``decode`` in a CUDA graph, which is replayed on other contents of the same memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mla_spec.judging.cuda_graph import Replay, captured, needs_cuda
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, shortened
from mla_spec.properties.hazards import overwrite
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.subjects.driver import Driver, Tensors
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports


def _needs_graphs(supports: Supports) -> str:
    return "" if supports.cuda_graphs else "does not declare cuda_graphs"


@law(needs=DECODE, cases=decode_cases, missing=_needs_graphs, unavailable=needs_cuda, live="tensors")
def test_decode_is_replayed_in_a_cuda_graph(run: Run, case: DecodeCase) -> None:
    """Captured for short sequences, decode gives what it should for longer ones, other tables, pages and queries."""
    judge_replays(run, case, captured)


def judge_replays(run: Run, case: DecodeCase, capture: Callable[[Callable[[], Any], str], Replay]) -> None:
    """Judge what a call of decode gives when it is replayed on new contents of its tensors.

    Args:
        capture: from a call and its device, what runs it again.
    """
    longer, driver = case.build(), run.driver
    shorter = shortened(replace(case, seed=case.seed + 1).build())
    shorter = replace(shorter, softmax_scale=longer.softmax_scale)  # a graph keeps it
    tensors = driver.tensors(DECODE, shorter)
    replay = there(_captured, driver, DECODE.asked(shorter, tensors=False), tensors, capture)
    for inputs in (longer, shorter):
        overwrite(tensors, driver.tensors(DECODE, inputs))
        run.agrees(DECODE, inputs, driver.read(DECODE, inputs, there(_replayed, driver, replay)))


def _captured(
    driver: Driver, inputs: Any, tensors: Tensors, capture: Callable[[Callable[[], Any], str], Replay]
) -> Replay:
    replay: Replay = driver.guard(lambda: capture(lambda: driver.raw(DECODE, inputs, tensors), driver.device))
    return replay


def _replayed(driver: Driver, replay: Replay) -> Any:
    return driver.guard(replay)
