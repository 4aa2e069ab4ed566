"""Every planted bug fails the laws it names, the subject without the bug passes them, and the record says why."""

from __future__ import annotations

from typing import Any

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.planted_bugs import PLANTED, PlantedBug
from mla_spec.subjects.supports import DTYPES

BUGS = list(PLANTED.values())
SHIPPED = (TorchExplicit, TorchAbsorbed, TorchSDPA)
STATEFUL = {"G8"}
"""These fail on what an earlier case left behind, so that a new subject may pass the record's case."""
CASES = 100
"""Generated cases a law. With the default ones some law kills each bug (``mla-spec selftest``), though not each that it names."""
CLAIMS = [(bug, law) for bug in BUGS for law in bug.killed_by]


def options_of(bug: PlantedBug, **more: Any) -> Options:
    """The options with which a bug's laws run."""
    return Options(compile=bug.compile, production=bug.production, **more)


KILLS = [(bug, law) for bug, law in CLAIMS if not all_laws()[law].unavailable(options_of(bug))]
"""Claims that any machine can test: not those that need a GPU."""
CONTROLS = sorted(
    {(bug.base, law) for bug, law in KILLS if bug.compile is bug.production is None and bug.base not in SHIPPED},
    key=lambda pair: (pair[0].__name__, pair[1]),
)
"""Subjects that ship conform in ``tests/judging/test_laws.py``. On what fails on a bug that must be compiled, or have a real load,
its base is run by ``test_bug_is_killed`` alone."""


def record_of(bug_id: str, law: str, *, minimise: bool = False) -> Record:
    """The record of the first dtype that fails, over as many cases as a law may need that is not the first to kill the bug."""
    bug, share = PLANTED[bug_id], CASES // len(DTYPES)
    for dtype in DTYPES:
        options = options_of(bug, examples=share, dtypes=(dtype,), spec=(bug.spec,), minimise=minimise)
        record = run_law(all_laws()[law], bug.make(), options)
        if record.verdict in ("fail", "crashed"):
            break
    return record


@pytest.mark.parametrize(("bug", "law"), KILLS, ids=lambda x: x.id if isinstance(x, PlantedBug) else x)
def test_bug_is_killed(bug: PlantedBug, law: str) -> None:
    """On the record's case a new subject with the bug fails again, and the one without it passes."""
    record = record_of(bug.id, law)
    assert record.verdict in ("fail", "crashed"), record.text()
    case = options_of(bug, case=parse_case(record.case))
    if bug.id not in STATEFUL:
        assert run_law(all_laws()[law], bug.make(), case).verdict in ("fail", "crashed")
    # A case that shows little may be trivial, and yet too much for the bug.
    assert run_law(all_laws()[law], bug.base(), case).verdict in ("pass", "incomplete")


@pytest.mark.parametrize(("base", "law"), CONTROLS, ids=lambda x: getattr(x, "name", x))
def test_base_passes(base: type, law: str) -> None:
    record = run_law(all_laws()[law], base(), Options(examples=12))
    assert record.verdict == "pass", record.text()


def test_every_law_kills_a_bug() -> None:
    assert set(all_laws()) == {law for _, law in CLAIMS}


def test_bugs_are_documented() -> None:
    for bug in BUGS:
        assert bug.make.__doc__, bug.id
        assert bug.symptom, bug.id
        assert bug.shows_when, bug.id
        assert bug.make().name == f"bug-{bug.id}"
        assert bug.id.startswith("X") != bool(bug.source), bug.id
        assert all(url.startswith("https://") for url in bug.source), bug.id


def test_record_explains_the_fault() -> None:
    """A halved output: law, element, got, want, bound, main term, smallest case, and a command that replays it."""
    law = "test_decode_agrees_with_reference"
    record = record_of("G17", law, minimise=True)
    text = record.text()
    assert text.startswith(f"{law} [bug-G17]: fail after ")
    for part in ("out[0, 0, 0, 0]: got ", ", want ", "exceeds the bound ", "main term of the bound: "):
        assert part in text
    assert f"  smallest case: {record.case}" in text
    replay = f"mla-spec check {PLANTED['G17'].spec} --law {law} --case {record.case}"
    assert f"  replay: {replay}" in text
    got, want = (float(text.split(word)[1].split()[0].rstrip(",")) for word in ("got ", "want "))
    assert got == pytest.approx(want / 2)


def test_record_of_changed_bits_explains_the_fault() -> None:
    text = record_of("F2", "test_decode_ignores_unused_cache_slots", minimise=True).text()
    assert " changed from " in text
    assert "unused cache slots were filled with nan" in text
    assert "the bits must be the same" in text


def test_record_of_a_crash_names_the_line() -> None:
    record = record_of("F16", "test_decode_ignores_unused_table_entries")
    assert record.verdict == "crashed"
    assert "IndexError" in record.message
    assert "paging.py:" in record.message
