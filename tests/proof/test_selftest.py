"""The selftest: what it runs, what it says of bugs that are killed, survive, or end their process; the peers' criteria."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.front.cli import main
from mla_spec.front.selftest_report import (
    BEGIN,
    END,
    report,
    summary,
    write_markdown,
)
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
from mla_spec.planted_bugs import PLANTED, PlantedBug
from mla_spec.planted_bugs.catalogue import NOT_PLANTED, catalogue
from mla_spec.proof.peer_criteria import (
    Close,
    Cosine,
    Criterion,
    Every,
    NoWorseThanLowPrecision,
    Similar,
    Within,
)
from mla_spec.proof.peer_results import accepted, can_see
from mla_spec.proof.peers import PEERS
from mla_spec.proof.reach import operations_that_differ
from mla_spec.proof.selftest import (
    BugResult,
    Matrix,
    laws_for,
    matrix_from,
    planted_bugs,
    run_selftest,
)
from mla_spec.text.terminal import write_json

SUBJECTS = """
import os

from mla_spec.adapters.pytorch import TorchAbsorbed


class Harmless(TorchAbsorbed):
    def absorb(self, kv_b_proj, *, config):
        return super().absorb(kv_b_proj, config=config)


class EndsProcess(TorchAbsorbed):
    def absorb(self, kv_b_proj, *, config):
        os._exit(3)


class CannotBeMade(TorchAbsorbed):
    def __init__(self):
        os._exit(3)

    def absorb(self, kv_b_proj, *, config):
        return super().absorb(kv_b_proj, config=config)
"""


@pytest.fixture
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "selftest_subjects.py").write_text(SUBJECTS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("selftest_subjects")


@pytest.mark.parametrize("bug", PLANTED.values(), ids=lambda bug: bug.id)
def test_laws_that_kill_a_bug_are_run_on_it(bug: PlantedBug) -> None:
    laws = laws_for(bug)
    assert set(bug.killed_by) == set(laws[: len(bug.killed_by)])


def test_operations_without_changed_code_do_not_differ() -> None:
    class Merges(TorchAbsorbed):
        def shares(self, lses):  # type: ignore[no-untyped-def]
            return super().shares(lses)

    class Profiled(TorchAbsorbed):
        profile = TorchExplicit.profile

    assert operations_that_differ(Merges) == {"merge"}
    assert "decode" in operations_that_differ(Profiled)
    assert operations_that_differ(PLANTED["L1"].make) == {"layer"}  # type: ignore[arg-type]


def test_results_of_bugs_that_are_killed_survive_or_end_their_process(subjects: ModuleType) -> None:
    bugs = [
        replace(PLANTED["C4"], id=name, make=getattr(subjects, name), killed_by=("test_absorb_splits_kv_b_proj",))
        for name in ("Harmless", "EndsProcess", "CannotBeMade")
    ]
    seen: list[str] = []
    matrix = run_selftest(
        [PLANTED["C4"], *bugs],
        Options(examples=4, dtypes=("float64",)),
        quick=True,
        jobs=2,
        progress=lambda result: seen.append(result.bug),
    )
    assert sorted(seen) == ["C4", "CannotBeMade", "EndsProcess", "Harmless"]
    assert not matrix.complete
    assert [result.bug for result in matrix.killed] == ["C4", "EndsProcess"]
    assert [result.bug for result in matrix.survivors] == ["Harmless", "CannotBeMade"]
    assert len(matrix.results[1].records) > 1
    assert [record.cases for record in matrix.results[3].records] == [0]
    for killed in matrix.killed:
        (kill,) = killed.records
        assert kill.law == "test_absorb_splits_kv_b_proj"
        assert kill.case.startswith("decode:")
        assert killed.cases_to_kill == kill.cases >= 1
        assert killed.seconds_to_kill > 0


def _result(bug: str, **verdicts: str) -> BugResult:
    records = (Record(law, bug, verdict, 7, seconds=2.0) for law, verdict in verdicts.items())  # type: ignore[arg-type]
    return BugResult(bug, "symptom", tuple(records))


def test_a_matrix_names_survivors_idle_laws_and_sole_killers() -> None:
    first, second, third = list(all_laws())[:3]
    results = (
        _result("P", **{first: "pass", second: "fail"}),
        _result("Q", **{first: "crashed", second: "fail"}),
        _result("R", **{first: "pass", third: "incomplete"}),
    )
    matrix = Matrix(results, complete=True)
    assert [result.bug for result in matrix.survivors] == ["R"]
    assert matrix.sole_killers == {second: ["P"]}
    assert third in matrix.idle_laws
    assert first not in matrix.idle_laws
    assert matrix.times == [4.0, 2.0]
    assert results[0].cases_to_kill == 14
    text = report(matrix)
    assert "2 of 3 planted bugs killed; time to kill: median 3.0 s, worst 4.0 s" in text
    assert "surviving: R" in text
    assert f"sole killers: {second} (P)" in text
    assert third in text
    assert third not in summary(Matrix(results, complete=False))


def test_a_law_that_always_needs_more_cases_than_another_is_named() -> None:
    early, late, later = list(all_laws())[:3]
    cases = {"P": {early: 2, late: 3, later: 2}, "Q": {early: 5, late: 6}}
    results = tuple(
        BugResult(bug, "", tuple(Record(law, bug, "fail", n) for law, n in of.items())) for bug, of in cases.items()
    )
    assert Matrix(results, complete=True).late_laws == [late]
    alone = BugResult("R", "", (Record(late, "R", "fail", 99), Record(early, "R", "pass", 1)))
    assert Matrix((*results, alone), complete=True).late_laws == []
    assert f"alone or first (after the fewest cases): {late}\n" in summary(Matrix(results, complete=True))


def test_a_marked_file_gets_the_score_and_another_the_whole_table(tmp_path: Path) -> None:
    law = next(iter(all_laws()))
    matrix = Matrix((_result("P", **{law: "fail"}),), complete=False)
    readme, whole = tmp_path / "README.md", tmp_path / "score.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for path in (readme, whole):
        write_markdown(str(path), matrix, ["| all of the peers |"], ["| peers |"])
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n1 of 1 planted bugs killed")
    assert text.endswith(f"| peers |\n{END}\nafter\n")
    assert "old" not in text
    row = f"| P | symptom | `{law}` |  | 7 | 2.0 |"  # of others nothing is known
    assert row in whole.read_text()
    assert row not in text
    assert whole.read_text().endswith("| all of the peers |\n")


def test_a_file_of_other_text_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = next(iter(all_laws()))
    matrix, other, written = tmp_path / "matrix.json", tmp_path / "notes.md", tmp_path / "score.md"
    write_json(str(matrix), Matrix((_result("P", **{law: "fail"}),), complete=False).as_dict())
    other.write_text("# Notes\n")
    for _ in range(2):  # what it has written it may replace
        assert main(["selftest", "--read", str(matrix), "--markdown", str(written)]) == 0
    assert main(["selftest", "--read", str(matrix), "--markdown", str(other)]) == 2
    assert f"{other} has other text; expected a matrix" in capsys.readouterr().err
    assert other.read_text() == "# Notes\n"


def test_a_matrix_that_was_written_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = next(iter(all_laws()))
    matrix = Matrix((_result("P", **{law: "fail"}), _result("Q", **{law: "pass"})), complete=True)
    file, again = tmp_path / "matrix.json", tmp_path / "again.json"
    write_json(str(file), matrix.as_dict())
    assert matrix_from(json.loads(file.read_text())) == matrix
    assert main(["selftest", "--read", str(file), "--json", str(again)]) == 1
    assert "1 of 2 planted bugs killed" in capsys.readouterr().out
    assert again.read_text() == file.read_text()
    file.write_text("{}")
    assert main(["selftest", "--read", str(file)]) == 2
    assert "--read must be what `mla-spec selftest --json` wrote" in capsys.readouterr().err


def test_the_catalogue_is_whole() -> None:
    """138 reports; each is planted, or says what is missing."""
    entries = catalogue()
    assert len({entry.id for entry in entries}) == len(entries) == 138
    planted = {bug.id.partition("-")[0] for bug in PLANTED.values()}
    assert not planted & {entry.id for entry in NOT_PLANTED}
    assert all(entry.missing for entry in NOT_PLANTED)
    assert all(entry.source and entry.symptom for entry in entries)


def test_the_command_lists_the_catalogue_and_refuses_what_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--catalogue"]) == 0
    out = capsys.readouterr().out
    assert "C15  not planted: which layers a checkpoint's stack has" in out
    assert main(["selftest", "--bug", "none"]) == 2
    assert "no planted bug has the id 'none'" in capsys.readouterr().err
    assert main(["selftest", "--device", "nowhere"]) == 2
    assert "device 'nowhere' cannot be used" in capsys.readouterr().err


WANT = np.array([1.0, -2.0, 3.0, 0.5])


@pytest.mark.parametrize(
    ("criterion", "good", "bad"),
    [
        (Close(0.0, 0.1), WANT + 0.09, WANT + 0.11),
        (Close(0.1, 0.0), 1.09 * WANT, 1.11 * WANT),
        (Close(0.0, 0.1, share=0.75), WANT + np.array([9.0, 0.0, 0.0, 0.0]), WANT + np.array([9.0, 9.0, 0.0, 0.0])),
        (Within(0.1, 0.1), WANT + np.array([0.0, 0.0, 0.29, 0.09]), WANT + np.array([0.0, 0.0, 0.29, 0.11])),
        (Within(0.1, 0.1), WANT, np.where(WANT == 3.0, np.nan, WANT)),
        (Similar(1e-2), 1.1 * WANT, 1.2 * WANT),
        (Cosine(0.99), WANT / 2, -WANT),
        (Every(Cosine(0.99), Close(0.0, 0.1)), 1.01 * WANT, WANT / 2),
        (NoWorseThanLowPrecision(2.0), WANT + 0.2, WANT + 0.3),
    ],
    ids=str,
)
def test_criteria(criterion: Criterion, good: np.ndarray, bad: np.ndarray) -> None:
    coarse = WANT + 0.1
    assert criterion.accepts(good, WANT, coarse)
    assert not criterion.accepts(bad, WANT, coarse)


def test_a_peer_accepts_correct_subjects_and_what_its_inputs_cannot_show() -> None:
    """With pages in order, a kernel that takes pages as a run is right; a halved output is not."""
    peer = next(peer for peer in PEERS if peer.name == "FlashInfer fa2, fa3")
    peer = replace(peer, lengths=((70, 33),))
    assert all(accepted(peer, subject()) for subject in (TorchExplicit, TorchAbsorbed, TorchSDPA))
    assert accepted(peer, PLANTED["X3"].make())
    assert not accepted(replace(peer, shuffled=True), PLANTED["X3"].make())
    assert not accepted(peer, PLANTED["G17"].make())


def test_what_a_peer_passes_beside_ordinary_arguments_finds_bugs() -> None:
    peer = next(peer for peer in PEERS if peer.noncontiguous)
    peer = replace(peer, lengths=((70, 33, 65),))
    assert accepted(peer, TorchAbsorbed())
    for bug, ordinary in (("N2", {"noncontiguous": False}), ("F16", {"unused_page": 0}), ("F2", {"unused": 0.0})):
        assert not accepted(peer, PLANTED[bug].make())
        assert accepted(replace(peer, **ordinary), PLANTED[bug].make())


def test_a_peer_does_not_see_what_results_do_not_show() -> None:
    (decode,) = (peer for peer in PEERS if peer.name == "FlashMLA dense decode")
    (prefill,) = (peer for peer in PEERS if peer.operation == "prefill")
    assert not can_see(decode, PLANTED["L10"])
    assert not can_see(prefill, PLANTED["K1"])
    assert not can_see(decode, PLANTED["X-heads-of-first-tile"])


def test_a_peer_sees_bugs_in_its_own_operation_only() -> None:
    peers = {peer.operation: peer for peer in PEERS}
    (cache_write,) = planted_bugs(["F19"])
    assert not any(can_see(peer, cache_write) for peer in peers.values())
    (reader,) = planted_bugs(["I5"])
    assert [operation for operation, peer in peers.items() if can_see(peer, reader)] == ["decode_quantized"]


@pytest.mark.parametrize("operation", ["decode_quantized", "sparse_prefill", "prefill"])
def test_emulated_inputs_reach_every_operation(operation: str) -> None:
    peer = next(peer for peer in PEERS if peer.operation == operation)
    peer = replace(peer, lengths=((140, 33),), out=Similar(1e-3))
    assert accepted(peer, TorchAbsorbed())
    assert not accepted(peer, PLANTED["G17"].make())
