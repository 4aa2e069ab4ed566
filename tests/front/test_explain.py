"""``mla-spec explain`` and the suspects of a check's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_spec.front.cli import main
from mla_spec.front.explain_command import laws_of
from mla_spec.front.explanation import explain
from mla_spec.front.overview import overview
from mla_spec.front.selftest_command import lengths, report_lines
from mla_spec.installed import all_laws, planted_bugs
from mla_spec.judging.causes import causes
from mla_spec.judging.finding import Finding
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.session import Asked
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.explained import Explained, explicable, score
from mla_spec.subjects.description import describe
from mla_spec.text.layout import Screen

CASE = "decode:dtype=float32,seqlens=5+7,kv_lora_rank=4,page_size=2"


def test_the_fault_of_a_planted_bug_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "record.json"
    assert main(["explain", CASE, planted_bugs()["F22"].spec, "--json", str(target)]) == 1
    out = capsys.readouterr().out
    assert "same wrong numbers as F22: The page is looked up for every other page only." in out
    assert all(len(line) <= 80 for line in out.splitlines())
    record = json.loads(target.read_text())
    assert [each["id"] for each in record["cause"]["suspects"]] == ["F22"]
    assert record["cause"]["try"][-1] == record["replay"]


def test_a_case_that_holds_needs_no_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", CASE, "torch-absorbed"]) == 0
    assert "nothing to explain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode:nonsense=1", "torch-absorbed"], "a decode case has no field 'nonsense'"),
        ([CASE, "no.such:Kernel"], "no.such"),
        ([CASE, "torch-absorbed", "--law", "test_nothing"], "unknown law"),
        (["ring_backward:dtype=float32", "torch-absorbed"], "name the law"),
    ],
)
def test_what_cannot_be_explained_is_said_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_law_of_a_case_is_that_of_its_operation_alone() -> None:
    assert laws_of(parse_case(CASE)) == ["test_decode_agrees_with_reference", "test_decode_lse_agrees_with_reference"]
    assert laws_of(parse_case("layer:dtype=float32"))[:2] == [
        "test_layer_stages_agree_with_reference",
        "test_layer_prefill_agrees_with_reference",
    ]


def test_the_score_counts_a_bug_only_among_the_first() -> None:
    results = [
        Explained("A", "law", ("A",), "case"),
        Explained("B", "law", ("X", "Y", "Z", "B"), "case"),
        Explained("C", "law", (), "case"),
        Explained("D", "", (), ""),
    ]
    text = score(results)
    assert "the cause of 1 of 3 planted bugs is named among the first 3 suspects (33 %), of 1 as the only one" in text
    assert "something with the same wrong numbers is named for 1 of 3 (33 %)" in text


def test_what_is_found_out_counts_where_it_is_about_the_part_that_is_wrong() -> None:
    def of(bug: str, about: str, *findings: Finding) -> Explained:
        return Explained(bug, "law", (), "case", findings=findings, about=frozenset([about]))

    reads, law, other = Finding("reads", "reads slot 3"), Finding("mask", "law: it is causal"), Finding("norm", "right")
    text = score(
        [
            of("A", "reads", reads),
            of("B", "mask", reads, law),
            of("C", "size", reads, other),
            of("D", "norm", reads, law, law, other),
            Explained("E", "", (), "", findings=(other,), about=frozenset(["norm"])),
        ]
    )
    assert "names the part that is wrong for 2 of 4 (50 %), for 1 of these by the statement of the law alone" in text
    assert text.endswith("what is found out of another bug would for 42 %")


def test_a_sample_of_bugs_is_spread_over_all() -> None:
    every = explicable(list(planted_bugs().values()))
    few = explicable(list(planted_bugs().values()), 7)
    assert len(few) == 7
    assert few[0] is every[0]
    assert set(few) <= set(every)


def test_reports_that_do_not_fit_a_screen_are_counted() -> None:
    def result(bug: str, seqlens: tuple[int, ...]) -> Explained:
        case = DecodeCase(dtype="float32", seqlens=seqlens).id
        law = "test_decode_agrees_with_reference"
        replay = f"mla-spec check pkg:Kernel --law {law} --case {case}"
        record = Record(law, bug, "fail", cases=1, message="wrong", case=case, replay=replay, dtype="float32")
        return Explained(bug, law, (), case, record)

    short, long = result("short", (5,)), result("long", tuple(range(1000, 1400)))
    assert lengths([short, Explained("none", "", (), "")]) == (
        f"0 of 1 reports do not fit 24 lines of 80 columns; the longest has {len(report_lines(short))} lines"
    )
    assert len(report_lines(long)) > 24
    assert lengths([short, long]).startswith("1 of 2 reports do not fit 24 lines of 80 columns: long; the longest has ")
    assert report_lines(Explained("none", "", (), "")) == []


def test_a_run_that_took_no_time_names_its_suspects() -> None:
    law = all_laws()["test_decode_agrees_with_reference"]
    bug = planted_bugs()["F22"]
    record = run_law(law, bug.make(), Options(case=parse_case(CASE), minimise=False))
    asked = Asked(Options(spec=(bug.spec,)), None, describe(bug.make()))
    (found,) = causes([record])
    assert record.seconds < 5
    explain([found], asked, 0)
    assert found.suspects == found.findings == []
    explain([found], asked)
    assert found.findings[0]["topic"] == "reads"
    found.findings.clear()
    found.suspects.clear()
    explain([found], asked, 120)
    assert [each["id"] for each in found.suspects] == ["F22"]
    assert found.as_dict()["findings"] == found.findings
    told = overview([record], Screen(), [found])
    assert f"found out: {found.findings[0]['says'][:30]}" in told
