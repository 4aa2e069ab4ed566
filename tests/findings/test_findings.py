"""Findings show themselves: each script is short, knows nothing of the suite, and shows the fault where its package is."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mla_spec.installed import all_laws
from mla_spec.operations.all import parse_case
from tests.findings.findings import FINDINGS, LONGEST, SCRIPTS, Finding, page

DOC = Path(__file__).parents[2] / "docs" / "findings.md"
every = pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.script)


@every
def test_the_fault_shows(finding: Finding) -> None:
    if reason := finding.missing():
        pytest.skip(reason)
    done = subprocess.run([sys.executable, finding.path], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, finding.shows in done.stdout) == (1, True), done.stdout + done.stderr


@every
def test_a_script_is_short_and_stands_alone(finding: Finding) -> None:
    text = finding.path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert not re.search(r"mla[_-]spec", text)
    assert "sys.exit(" in text


@every
def test_law_and_case_exist(finding: Finding) -> None:
    assert finding.law in all_laws()
    case = parse_case(finding.case)
    assert case.short_id == finding.case
    case.build()


def test_every_script_is_of_a_finding() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {finding.script for finding in FINDINGS}


def test_the_page_is_what_the_data_give() -> None:
    assert DOC.read_text(encoding="utf-8") == page()


def test_another_version_is_not_run() -> None:
    found = next(finding for finding in FINDINGS if finding.package == "torch")
    assert replace(found, version="0.0.1").missing().endswith("not 0.0.1")
    assert replace(found, package="no-such-package").missing() == "no-such-package is not installed"
