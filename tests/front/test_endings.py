"""Subjects that end the process, as if all were well, while they are imported, made, read or called: none conforms."""

from __future__ import annotations

import json
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
ENDED = ("os._exit", "sys.exit")
"""What ends a process of the subject's own."""


def subject(folder: Path, place: str, end: str, file: str = "ending.py") -> str:
    (folder / file).write_text(SUBJECT.format(place=place, end=ENDS[end]))
    return f"{folder / file}:Subject"


def arguments(*specs: str) -> list[str]:
    asked = ("--law", LAW, "--examples", "4", "--seed", "0", "--dtype", "float32")
    return ["check", *specs, *asked, "--jobs", "1", "-v", "--explain", "0", "--no-minimise"]


@pytest.mark.parametrize("places", [PLACES[:-1], PLACES[-1:]], ids=["made", "called"])
def test_a_subject_that_ends_its_worker_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], places: tuple[str, ...]
) -> None:
    """All of one run: each ends its own process, and those that follow are judged."""
    rows = [(place, end, subject(tmp_path, place, end, f"{place}_{end[:2]}.py")) for place in places for end in ENDED]
    target = tmp_path / "records.json"
    assert main([*arguments(*(spec for _, _, spec in rows)), "--json", str(target)]) == 1
    out, _ = capsys.readouterr()
    records = json.loads(target.read_text())
    for (place, end, spec), record in zip(rows, records, strict=True):
        name, count = ("torch-absorbed", 1) if place == "call" else (spec, 0)
        assert (record["subject"], record["verdict"], record["cases"]) == (name, "crashed", count)
        assert ("the process ended with exit code 0" if end == "os._exit" else "SystemExit: 0 (") in record["message"]
        assert f"{LAW} [{name}]: crashed after {count} cases" in out


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


def test_pytest_reports_a_subject_that_ends_its_worker(pytester: pytest.Pytester) -> None:
    """Four of one run: each fails alone."""
    law = ("--pyargs", "mla_spec.properties.test_decode", "-k", LAW, "--mla-examples", "4", "--mla-seed", "0")
    rows = [(place, end, f"{place}_{end[:2]}.py") for place in ("import", "call") for end in ENDED]
    impls = [word for place, end, file in rows for word in ("--mla-impl", subject(pytester.path, place, end, file))]
    options = ("--mla-no-minimise", "-p", "no:xdist", "-p", "no:cacheprovider")
    done = pytester.runpytest_subprocess(*law, *impls, *options)
    done.assert_outcomes(failed=4, deselected=done_deselected(done))
    assert done.ret != 0
    said = {"os._exit": "*ended with exit code 0*", "sys.exit": "*SystemExit: 0*"}
    done.stdout.fnmatch_lines([said[end] for _, end, _ in rows])  # in this order


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

        @parametrize_with_checks([Subject()], options=Options(examples=4, seed=0, dtypes=("float32",)))
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


def test_parametrize_with_checks_takes_a_name_and_survives(pytester: pytest.Pytester) -> None:
    specs = [subject(pytester.path, place, "os._exit", f"{place}_ends.py") for place in ("import", "call")]
    pytester.makepyfile(
        test_mine=f"""
        from mla_spec import parametrize_with_checks
        from mla_spec.judging.law import Options

        @parametrize_with_checks([*{specs!r}, "torch-absorbed"], options=Options(examples=4, seed=0, dtypes=("float32",)))
        def test_mla(subject, check):
            check(subject)
        """
    )
    done = pytester.runpytest_subprocess("-k", LAW, "-p", "no:xdist", "-p", "no:cacheprovider")
    done.assert_outcomes(failed=2, passed=1, deselected=done_deselected(done))
    for text in ("crashed after 0 cases", "crashed after 1 cases"):
        done.stdout.fnmatch_lines([f"*{text}*", "*the process ended with exit code 0*"])
