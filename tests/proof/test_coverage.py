"""Coverage: regimes of cases, cells, and reasons for empty ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import EVERY_REGIME, Options, Reason
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import KINDS, REGIMES, regimes_of
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.proof.coverage import Coverage, measure_coverage, report
from mla_spec.properties.coverage_reasons import REASONS
from mla_spec.subjects.supports import DTYPES

LAW = "test_merge_is_associative"
CELLS = [(LAW, "one part", "float64"), (LAW, "two parts and more", "float64")]


def coverage(*reasons: Reason, verdict: str = "pass") -> Coverage:
    """Of one law that saw two parts and more, and never one."""
    record = Record(LAW, "subject", verdict, cases=5)  # type: ignore[arg-type]
    return Coverage((record,), Counter({CELLS[0]: 0, CELLS[1]: 5}), {CELLS[1]: ["X1"]}, reasons)


ONE_PART = Reason((LAW,), ("one part",), "one part has no order")


def test_every_kind_of_case_has_regimes() -> None:
    assert set(REGIMES) == set(KINDS)
    for kind, regimes in REGIMES.items():
        names = [name for name, _ in regimes]
        assert len(set(names)) == len(names), kind


def test_regimes_of_cases() -> None:
    decode = DecodeCase(dtype="float32", seqlens=(0, 3), s=2, logit_std=1e4, regime="ties")
    assert regimes_of(decode) == ("ties", "huge scores", "several queries", "no keys", "ragged lengths")
    prefill = PrefillCase(dtype="float32", seqlens_q=(2, 1), seqlens_k=(1, 4), logit_std=0.1)
    assert regimes_of(prefill) == ("typical", "flat scores", "more keys than queries", "fewer keys than queries")
    merge = MergeCase(dtype="float32", parts=2, lse_mean=-200.0, empty=0.3)
    assert regimes_of(merge) == ("two parts and more", "near LSEs", "LSEs beyond exp", "empty parts", "packed")


def test_an_empty_cell_needs_a_reason() -> None:
    assert coverage().unexplained == [CELLS[0]]
    assert not coverage().complete
    assert f"no case and no reason: {LAW}, one part: float64" in report(coverage())
    explained = coverage(ONE_PART)
    assert explained.complete
    assert f"empty: 1 cell of {LAW}: one part has no order" in report(explained)
    assert explained.as_dict()["cells"][0]["reason"] == "one part has no order"


def test_a_reason_that_explains_nothing_is_an_error() -> None:
    idle = Reason((LAW,), ("two parts*",), "none ever occur")
    assert coverage(ONE_PART, idle).idle_reasons == [idle]
    assert "this reason explains nothing" in report(coverage(ONE_PART, idle))
    assert not coverage(ONE_PART, idle).complete
    assert not coverage(ONE_PART, Reason((LAW,), ("one part",), "of another dtype", dtypes=("float16",))).complete


def test_a_law_that_fails_is_no_coverage() -> None:
    assert not coverage(ONE_PART, verdict="fail").complete
    assert not coverage(ONE_PART, verdict="incomplete").complete


def test_cells_are_counted_by_running_the_law() -> None:
    laws = ["test_merge_is_associative", "test_absorb_splits_kv_b_proj"]
    kill = {"law": LAW, "case": MergeCase(dtype="float16", parts=3).id}
    matrix = [{"bug": "X1", "killed_by": [LAW], "records": [kill, {"law": laws[1], "case": ""}]}]
    measured = measure_coverage(["torch-absorbed"], matrix, Options(examples=400), laws=laws)
    assert [record.verdict for record in measured.records] == ["pass", "pass"]
    batched = {dtype: measured.cases[LAW, "batched", dtype] for dtype in DTYPES}
    packed = {dtype: measured.cases[LAW, "packed", dtype] for dtype in DTYPES}
    assert {dtype: batched[dtype] + packed[dtype] for dtype in DTYPES} == dict.fromkeys(DTYPES, 100)
    assert min(batched.values()) > 0
    assert measured.cases[LAW, "one part", "float64"] == 0
    assert measured.killed[LAW, "packed", "float16"] == ["X1"]
    assert (LAW, "batched", "float16") not in measured.killed
    assert {cell for cell in measured.unexplained if cell[0] == LAW} == set()


def subject_file(folder: Path) -> str:
    file = folder / "rope_only.py"
    file.write_text("class RopeOnly:\n    def rope(self, x, positions, *, rope):\n        return x\n")
    return f"{file}:RopeOnly"


def test_a_law_without_cases_is_one_empty_cell_per_dtype(tmp_path: Path) -> None:
    made = subject_file(tmp_path)
    measured = measure_coverage([made], [], Options(), laws=[LAW])
    assert set(measured.cases) == {(LAW, EVERY_REGIME, dtype) for dtype in DTYPES}
    assert not measured.complete


def test_a_subject_that_ends_its_process_is_told(tmp_path: Path) -> None:
    file = tmp_path / "ends.py"
    file.write_text("import os\nclass Ends:\n    def rope(self, *arguments, **options):\n        os._exit(0)\n")
    laws = ["test_rope_preserves_norm", LAW]
    measured = measure_coverage([f"{file}:Ends"], [], Options(examples=2), laws=laws)
    assert [(record.law, record.verdict) for record in measured.records] == [
        (laws[0], "crashed"),
        (laws[1], "unsupported"),
    ]
    assert sum(n for cell, n in measured.cases.items() if cell[0] == laws[0]) > 0


def test_reasons_name_laws_and_regimes_that_exist() -> None:
    regimes = {name for named in REGIMES.values() for name, _ in named} | {EVERY_REGIME}
    for reason in REASONS:
        for law in all_laws():
            if any(Reason((pattern,), ("*",), "").covers((law, "", "")) for pattern in reason.laws):
                break
        else:
            pytest.fail(f"no law matches {reason.laws}")
        assert any(reason.covers((law, regime, dtype)) for regime in regimes for law in all_laws() for dtype in DTYPES)
        assert reason.why


def test_a_matrix_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "matrix.json"
    for text in ("{}", "[1]", "no JSON"):
        file.write_text(text)
        assert main(["coverage", "--selftest", str(file)]) == 2
        assert "--selftest must be what `mla-spec selftest --json` wrote" in capsys.readouterr().err
    record = {"law": "test_none", "subject": "a", "verdict": "pass"}
    bugs = [{"bug": "X1", "symptom": "", "records": [record]}]
    file.write_text(json.dumps({"complete": True, "bugs": bugs}))
    assert main(["coverage", "--selftest", str(file)]) == 2
    assert "has the law 'test_none'" in capsys.readouterr().err
    assert main(["coverage", "no-such-subject"]) == 2
