"""What a run shows of a subject, level by level."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from mla_spec.front.cli import main
from mla_spec.front.reports.account import read_document
from mla_spec.front.reports.statement import LEVELS, findings, level_of, table
from mla_spec.installed import all_laws
from mla_spec.judging.verdict import Record

LAWS = (
    "test_decode_agrees_with_reference",
    "test_decode_gives_the_same_bits_again",
    "test_decode_sequences_are_independent",
    "test_decode_ignores_unused_cache_slots",
    "test_decode_roundings_do_not_add_up",
)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statement") / "run.jsonl"
    asked = [word for law in LAWS for word in ("--law", law)]
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    command = ["check", "torch-absorbed", *asked, *dtypes, "--examples", "6", "--seed", "0", "--in-process"]
    assert main([*command, "--records", str(path)]) == 0
    return path


def changed(records: Path, folder: Path, **changes: Any) -> str:
    """The records with some fields of the verdicts on the first law in bfloat16 replaced, or of the subject."""
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        if line["type"] == "verdict" and (line["law"], line["dtype"]) == (LAWS[0], "bfloat16"):
            line |= {name: value for name, value in changes.items() if name in line}
        if line["type"] == "subject" and "profiles" in changes:
            for profile in line["profiles"].values():
                profile |= changes["profiles"]
    path = folder / "changed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def levels(path: str) -> dict[str, str]:
    (account,) = read_document([path]).accounts
    header, row = table(account)
    assert row[0] == "decode"
    return dict(zip(header[1:], row[1:], strict=True))


def test_each_level_is_reached_by_its_own_laws(records: Path, tmp_path: Path) -> None:
    path = changed(records, tmp_path, profiles={"batch_invariant": True})
    reached = levels(path)
    assert list(reached) == ["exact", "worst-case", "probable and statistical", "deterministic", "batch-invariant"]
    assert set(reached.values()) == {"every dtype"}


def test_what_the_profile_does_not_claim_is_no_level(records: Path, tmp_path: Path) -> None:
    reached = levels(changed(records, tmp_path, profiles={"batch_invariant": False, "deterministic": False}))
    assert not {"deterministic", "batch-invariant"} & set(reached)


def test_a_violation_is_named_in_its_level_and_dtype(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(records, tmp_path, verdict="fail", message="wrong")
    assert levels(path)["worst-case"] == "float32; VIOLATED in bfloat16"
    capsys.readouterr()
    assert main(["statement", path, "--badge", str(tmp_path / "badge.svg")]) == 1
    out = capsys.readouterr().out
    assert "torch-absorbed violates mla-spec" in out
    assert "| decode | every dtype | float32; VIOLATED in bfloat16 |" in out
    text = "".join(ET.parse(tmp_path / "badge.svg").getroot().itertext())
    assert "violates" in text
    waived = changed(records, tmp_path, verdict="fail", message="wrong", waived="known (until 2999-01-01)")
    assert levels(waived)["worst-case"] == "float32; waived in bfloat16"
    assert main(["statement", waived]) == 0
    assert f"| {LAWS[0]} in bfloat16 | known (until 2999-01-01) |".replace("_", "\\_") in capsys.readouterr().out
    unclear = changed(records, tmp_path, verdict="incomplete", message="no memory")
    assert levels(unclear)["worst-case"] == "float32; not judged in bfloat16"
    assert main(["statement", unclear]) == 3


def test_the_statement_says_under_which_conditions(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    badge = tmp_path / "badge.svg"
    assert main(["statement", str(records), "--badge", str(badge)]) == 0
    out = capsys.readouterr().out
    for named in ("conforms to mla-spec", "for decode on cpu", "--seed 0 --examples 6", "profile of bfloat16", "torch"):
        assert named in out
    root = ET.parse(badge).getroot()
    assert root.tag == f"{SVG}svg"
    assert "conforms · 1 operation" in "".join(root.itertext())
    assert float(root.get("width") or 0) == sum(
        float(r.get("width") or 0) for r in root.findall(f"{SVG}rect")[1:2]
    ) + float(root.findall(f"{SVG}rect")[1].get("x") or 0)


def test_records_that_are_missing_make_no_statement_of_conformance(records: Path, tmp_path: Path) -> None:
    path, badge = tmp_path / "part.jsonl", tmp_path / "badge.svg"
    path.write_text(
        "".join(f"{line}\n" for line in records.read_text().splitlines() if LAWS[1] not in line or '"run"' in line[:20])
    )
    assert main(["statement", str(path), "--badge", str(badge), "-o", str(tmp_path / "out.md")]) == 3
    assert "incomplete" in badge.read_text()
    assert "so far" not in (tmp_path / "out.md").read_text()
    assert "is judged in part by" in (tmp_path / "out.md").read_text()


def test_every_level_but_two_has_laws_by_name() -> None:
    named = {level_of(Record(law, "s", "pass")) for law in all_laws()}
    assert named == set(LEVELS) - {"worst-case"}
    assert level_of(Record("test_rope_agrees_with_reference", "s", "pass", worst=0.5)) == "worst-case"


def test_findings_cover_every_judged_cell(records: Path) -> None:
    (account,) = read_document([str(records)]).accounts
    assert {(each.operation, each.dtype) for each in findings(account)} == {
        ("decode", "float32"),
        ("decode", "bfloat16"),
    }


def test_a_subject_of_which_nothing_was_judged_has_no_levels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rope.py").write_text("class R:\n    def rope(self, x, positions, *, rope):\n        return x\n")
    (tmp_path / "broken.py").write_text("import nothing_here\n")
    options = ["--law", "merge", "--seed", "0", "--examples", "1"]
    for name, way, exit_code, said in (
        ("rope.py:R", "--in-process", 3, "judged no operation of R"),
        ("broken.py:K", "--jobs=1", 1, "violates mla-spec"),
    ):
        path = str(tmp_path / f"{name[:4]}.jsonl")
        assert main(["check", f"{tmp_path / name}", *options, way, "--records", path]) == exit_code
        capsys.readouterr()
        assert main(["statement", path]) == exit_code
        out = capsys.readouterr().out
        assert said in out
        assert ("| operation |" in out) == (name == "broken.py:K")
        assert "every dtype" not in out
        for format in ("markdown", "html", "junit", "github"):
            assert main(["report", path, "--format", format, "-o", str(tmp_path / "out")]) == 0
