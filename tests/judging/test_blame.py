"""An exception of the suite's own code is told as such, beside a subject and where it is judged; one of a subject never."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.subjects.blame import suite_failed
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import Handle, call_method, there
from mla_spec.subjects.process import apart
from mla_spec.subjects.violation import SubjectCrashed, SuiteFailed

LAW = all_laws()["test_decode_agrees_with_reference"]
OPTIONS = Options(examples=4, dtypes=("float32",), minimise=False)
SAID = "the suite itself failed, not the subject: KeyError"


@pytest.fixture(scope="module")
def subject() -> Iterator[Handle]:
    with apart("torch-absorbed") as made:
        yield made


def test_an_exception_of_the_suite_beside_a_subject_is_the_suites(subject: Handle) -> None:
    driver = there(Driver, subject, "float32", "cpu")
    with pytest.raises(SuiteFailed, match=r"ValueError: invalid literal.*driver\.py:\d+"):
        driver.number("no number")
    with pytest.raises(SubjectCrashed, match="AttributeError"):
        there(call_method, subject, "rope", None, None, rope=None)


def fails(*arguments: Any) -> None:
    raise KeyError("planted")


def test_a_law_that_raises_is_incomplete(subject: Handle) -> None:
    record = run_law(replace(LAW, check=fails), subject, OPTIONS)
    assert (record.verdict, record.message.startswith(SAID)) == ("incomplete", True), record.text()
    assert record.case.startswith("decode:")


def test_cases_that_cannot_be_drawn_are_incomplete(subject: Handle) -> None:
    record = run_law(replace(LAW, first=fails), subject, OPTIONS)
    assert (record.verdict, record.message.startswith(SAID)) == ("incomplete", True), record.text()


def test_a_run_in_which_the_suite_fails_does_not_conform(tmp_path: Path) -> None:
    """What a module of the suite needs is gone; that a subject took it makes no difference."""
    kernel, out = tmp_path / "kernel.py", tmp_path / "out.json"
    kernel.write_text(
        "import mla_spec.subjects.driver\n"
        "from mla_spec.adapters.pytorch import TorchAbsorbed as Kernel\n"
        "mla_spec.subjects.driver.TORCH_DTYPES.clear()\n"
    )
    line = ["check", f"{kernel}:Kernel", "--law", LAW.name, "--examples", "2", "--dtype", "float32", "--explain", "0"]
    assert main([*line, "--seed", "0", "--jobs", "1", "--json", str(out)]) == 3
    (record,) = json.loads(out.read_text())
    assert (record["verdict"], record["message"].startswith(SAID)) == ("incomplete", True), record


def raised(code: str, name: str, file: str) -> BaseException:
    try:
        exec(compile(code, file, "exec"), {"__name__": name})
    except BaseException as error:
        return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
    raise AssertionError


@pytest.mark.parametrize(
    ("code", "name", "ours"),
    [
        ("1 / 0", "mla_spec.subjects.driver", True),
        ("import torch; torch.ones(2) + torch.ones(3)", "mla_spec.subjects.driver", True),
        ("import json; json.loads('{')", "mla_spec.judging.law", True),
        ("1 / 0", "mla_spec.adapters.pytorch", False),
        ("1 / 0", "mla_spec.planted_bugs", False),
        ("1 / 0", "flash_mla.interface", False),
        ("1 / 0", "kernel", False),
        ("raise MemoryError", "mla_spec.subjects.driver", False),
        ("raise RuntimeError('CUDA error: an illegal memory access')", "mla_spec.subjects.driver", False),
    ],
)
def test_whose_it_is(code: str, name: str, ours: bool) -> None:
    assert suite_failed(raised(code, name, "/somewhere/file.py")) is ours
