"""Processes of a run: under a tool, after the death of the command, and what reaches the one of the subject."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import CALLED
from mla_spec.operations.operation import Exactly, Operation, Within
from mla_spec.properties.cases import CASES
from mla_spec.subjects import process as processes
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import there
from mla_spec.subjects.process import SubjectProcess
from mla_spec.subjects.supports import Supports

LAW = "test_decode_agrees_with_reference"
TOOL = """
import os, signal, subprocess, sys, time
from mla_spec.adapters.pytorch import TorchAbsorbed

class Reported(TorchAbsorbed):
    def decode(self, q, *arguments, **options):
        if q.shape[2] > 1:
            os.write(2, b"==7== Invalid read of size 4" + bytes([10]))
        return super().decode(q, *arguments, **options)

class Leaves(TorchAbsorbed):
    def decode(self, *arguments, **options):
        subprocess.Popen(["sleep", sys.argv[0] and "31536001"], start_new_session=True)
        time.sleep(1000)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tools.py"
    path.write_text(TOOL)
    return path


def record_under(spec: str, under: str, **options: Any) -> Any:
    with WorkerPool(timeout=60, under=under) as pool:
        asked = Options(examples=8, seed=0, dtypes=("float32",), spec=(spec,), **options)
        return pool.submit(LAW, spec, asked).result()


def test_a_tool_without_a_report_changes_nothing() -> None:
    assert record_under("torch-absorbed", "env").verdict == "pass"


def test_a_report_fails_the_smallest_case_that_shows_it(file: Path) -> None:
    record = record_under(f"{file}:Reported", "env", minimise_seconds=8.0)
    assert (record.verdict, record.message) == ("fail", "env reports: Invalid read of size 4")
    assert record.case.startswith("decode:") and "num_heads=1," not in record.case


def test_an_exit_code_of_the_tool_fails_the_law() -> None:
    record = record_under("torch-absorbed", """sh -c '"$@"; exit 9' sh""")
    assert record.verdict == "fail"
    assert record.message.startswith("under sh the process ended with 9")


def sleepers() -> list[int]:
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"31536001" in line.read_bytes().split(b"\0")[1:2]:
                found.append(int(line.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_outlives_the_command(file: Path, number: int) -> None:
    """Not even what a subject has started in a session of its own."""
    command = [
        sys.executable,
        "-m",
        "mla_spec.front.cli",
        "check",
        f"{file}:Leaves",
        "--law",
        LAW,
        "--jobs",
        "1",
        "--seed",
        "0",
    ]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert wait_for(sleepers, 90)
        run.send_signal(number)
        run.wait(60)
        assert wait_for(lambda: not sleepers(), 20)
    finally:
        run.kill()
        for pid in sleepers():
            os.kill(pid, signal.SIGKILL)


def answers(operation: Operation, inputs: Any) -> list[Any]:
    """The exact values that a call must give."""
    expected = operation.expected(inputs, Profile.default("float32"), Supports())
    return [want.value for want in expected if isinstance(want, Within | Exactly)]


@pytest.fixture(scope="module")
def absorbed() -> Iterator[SubjectProcess]:
    process = SubjectProcess("torch-absorbed")
    yield process
    process.stop()


@pytest.mark.parametrize("operation", CALLED, ids=lambda operation: operation.name)
def test_no_answer_is_sent_to_the_subject(
    operation: Operation, absorbed: SubjectProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    framed = processes.framed
    monkeypatch.setattr(processes, "framed", lambda parts: (sent.append(b"".join(map(bytes, parts))), framed(parts))[1])
    case = CASES[operation.name].ordinary(Supports(), Profile.default("float32"))[0]
    inputs = operation.build(case)
    driver = there(Driver, absorbed.subject, "float32", "cpu")
    driver.call(operation, inputs)
    driver.read(operation, inputs, driver.raw(operation, inputs, driver.tensors(operation, inputs)))
    assert sent
    for want in answers(operation, inputs):
        if want.size > 8 and np.unique(want).size > 8 and operation.name not in VIEWS:
            for dtype in (np.float64, np.float32):
                assert np.ascontiguousarray(want, dtype).tobytes() not in b"".join(sent)


VIEWS = ("write_cache",)
"""Operations whose answer is their arguments in another place."""


def test_equal_seeds_give_equal_cases_whatever_a_module_holds(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    for constants in ("", "A, B, C = 48, 1234567, 77\n"):
        (tmp_path / "constant.py").write_text(f"{constants}from mla_spec.adapters.pytorch import TorchAbsorbed as K\n")
        seen.append([])
        subject = SubjectProcess(f"{tmp_path}/constant.py:K")
        options = Options(examples=60, seed=5, dtypes=("bfloat16",), announce=lambda case: seen[-1].append(case.id))
        try:
            run_law(all_laws()[LAW], subject.subject, replace(options, isolated=True))
        finally:
            subject.stop()
    assert seen[0] == seen[1]
    assert len(seen[0]) >= 60
