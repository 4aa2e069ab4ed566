"""Subjects that end the process, as if all were well, while they are imported, made, read or called: none conforms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mla_spec.front.cli import main

pytest_plugins = ["pytester"]

LAW = "test_decode_agrees_with_reference"
ENDS = {
    "os._exit": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "SystemExit": "raise SystemExit",
    "BaseException": "raise BaseException('over')",
}
SUBJECT = """
import os
import sys
from mla_spec.adapters.pytorch import TorchAbsorbed

def end(place):
    if place == {place!r}:
        {end}

end("import")

class Subject(TorchAbsorbed):
    def __init__(self):
        end("construction")

    @property
    def supports(self):
        end("attribute")
        return TorchAbsorbed.supports

    def decode(self, *arguments, **options):
        end("call")
        return super().decode(*arguments, **options)
"""
PLACES = ("import", "construction", "attribute", "call")


def subject(folder: Path, place: str, end: str) -> str:
    file = folder / "ending.py"
    file.write_text(SUBJECT.format(place=place, end=ENDS[end]))
    return f"{file}:Subject"


def arguments(spec: str) -> list[str]:
    return ["check", spec, "--law", LAW, "--examples", "4", "--dtype", "float32", "--jobs", "1", "-v"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("end", ["os._exit", "sys.exit"])
def test_a_subject_that_ends_its_worker_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str, place: str
) -> None:
    code = main(arguments(subject(tmp_path, place, end)))
    out, _ = capsys.readouterr()
    if place == "call":
        assert code == 1
        assert f"{LAW} [torch-absorbed]: crashed after 1 cases" in out
        assert ("the process ended with exit code 0" if end == "os._exit" else "SystemExit: 0 (") in out
    else:
        assert code == 1
        assert f"{LAW} [{tmp_path}/ending.py:Subject]: crashed after 0 cases" in out
        assert ("the process ended with exit code 0" if end == "os._exit" else "SystemExit: 0 (") in out


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("end", ["sys.exit", "SystemExit", "BaseException"])
def test_a_subject_that_raises_what_is_no_exception_in_the_same_process_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str, place: str
) -> None:
    code = main([*arguments(subject(tmp_path, place, end)), "--in-process"])
    out, err = capsys.readouterr()
    text = "BaseException: over" if end == "BaseException" else "SystemExit: "
    assert (code, text in out, text in err) == ((1, True, False) if place == "call" else (2, False, True))


@pytest.mark.parametrize("place", PLACES)
def test_the_process_of_the_command_does_not_end_with_0_without_a_report(tmp_path: Path, place: str) -> None:
    command = [sys.executable, "-m", "mla_spec.front.cli", *arguments(subject(tmp_path, place, "os._exit"))]
    done = subprocess.run([*command, "--in-process"], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "the process was ended by os._exit(0) before there was a report" in done.stderr


@pytest.mark.parametrize("place", ["import", "call"])
@pytest.mark.parametrize("end", ["os._exit", "sys.exit"])
def test_pytest_reports_a_subject_that_ends_its_worker(pytester: pytest.Pytester, end: str, place: str) -> None:
    spec = subject(pytester.path, place, end)
    law = ("--pyargs", "mla_spec.properties.test_decode", "-k", LAW, "--mla-examples", "4")
    done = pytester.runpytest_subprocess(*law, "--mla-impl", spec, "-p", "no:xdist", "-p", "no:cacheprovider")
    done.assert_outcomes(failed=1, deselected=done_deselected(done))
    assert done.ret != 0
    done.stdout.fnmatch_lines(["*ended with exit code 0*" if end == "os._exit" else "*SystemExit: 0*"])


def done_deselected(done: pytest.RunResult) -> int:
    return done.parseoutcomes().get("deselected", 0)


@pytest.mark.parametrize(("place", "end"), [("import", "os._exit"), ("call", "os._exit"), ("call", "sys.exit")])
def test_parametrize_with_checks_reports_it_too(pytester: pytest.Pytester, place: str, end: str) -> None:
    subject(pytester.path, place, end)
    pytester.makepyfile(
        test_mine="""
        from ending import Subject
        from mla_spec import parametrize_with_checks
        from mla_spec.judging.law import Options

        @parametrize_with_checks([Subject()], options=Options(examples=4, dtypes=("float32",)))
        def test_mla(subject, check):
            check(subject)
        """
    )
    done = pytester.runpytest_subprocess("-k", LAW, "-p", "no:xdist", "-p", "no:cacheprovider")
    assert done.ret != 0
    if end == "os._exit":
        assert done.ret == 3
        done.stderr.fnmatch_lines(["*the process was ended by os._exit(0) before there was a report*"])
    else:
        done.stdout.fnmatch_lines(["*crashed after 1 cases*", "*SystemExit: 0 (*"])


@pytest.mark.parametrize(("place", "text"), [("import", "crashed after 0 cases"), ("call", "crashed after 1 cases")])
def test_parametrize_with_checks_takes_a_name_and_survives(pytester: pytest.Pytester, place: str, text: str) -> None:
    spec = subject(pytester.path, place, "os._exit")
    pytester.makepyfile(
        test_mine=f"""
        from mla_spec import parametrize_with_checks
        from mla_spec.judging.law import Options

        @parametrize_with_checks([{spec!r}, "torch-absorbed"], options=Options(examples=4, dtypes=("float32",)))
        def test_mla(subject, check):
            check(subject)
        """
    )
    done = pytester.runpytest_subprocess("-k", LAW, "-p", "no:xdist", "-p", "no:cacheprovider")
    done.assert_outcomes(failed=1, passed=1, deselected=done_deselected(done))
    done.stdout.fnmatch_lines([f"*{text}*", "*the process ended with exit code 0*"])
