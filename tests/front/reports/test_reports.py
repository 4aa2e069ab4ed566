"""Reports from records, read as those read them for whom they are made."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mla_spec.front.cli import main
from mla_spec.front.reports.account import read_document
from mla_spec.front.reports.github import annotation
from mla_spec.front.reports.heat import operations_by_dtype, queries_by_head, regimes_by_law
from mla_spec.front.reports.markdown import code, md
from mla_spec.judging.records import read_records

KERNEL = """
from mla_spec import Supports
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel:
    name = "<b>ours</b> | @all `x` #1 ]]>"
    supports = Supports(dtypes=("float32", "bfloat16"), num_heads=(1, 3), empty_row="unsupported")

    def decode(self, q, kv_cache, block_table, cache_seqlens, *, head_dim_v, softmax_scale, causal):
        scale = q.shape[-1] ** -0.5 if q.shape[2] == 3 else softmax_scale
        return TorchAbsorbed().decode(
            q, kv_cache, block_table, cache_seqlens, head_dim_v=head_dim_v, softmax_scale=scale, causal=causal
        )

    def merge(self, outs, lses):
        raise ValueError("<script>alert(1)</script> \\x1b[31m ```")
"""
LAWS = (
    "test_decode_agrees_with_reference",
    "test_decode_does_not_modify_its_inputs",
    "test_merge_agrees_with_reference",
)
CASES = {"float32", "bfloat16"}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "kernel.py").write_text(KERNEL)
    file = folder / "run.jsonl"
    asked = [word for law in (*LAWS, "test_rope_preserves_norm") for word in ("--law", law)]
    spec = f"{folder / 'kernel.py'}:Kernel"
    options = ["--examples", "60", "--seed", "0", "--in-process", "--records", str(file)]
    assert main(["check", spec, *asked, *options]) == 1
    return str(file)


def report(records: str, format: str, folder: Path) -> str:
    path = folder / "report"
    assert main(["report", records, "--format", format, "-o", str(path)]) == 0
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page whose elements are closed in the order in which they were opened."""

    VOID = {"meta", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.links: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.classes.update((dict(attrs).get("class") or "").split())
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_well_formed_and_needs_nothing_else(records: str, tmp_path: Path) -> None:
    text = report(records, "html", tmp_path)
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not {"script", "link", "img", "iframe", "b"} & set(page.seen), "what a subject says is text"
    assert "url(" not in text
    assert "\x1b" not in text
    assert "<b>ours</b> | @all `x` #1 ]]>" in page.words
    assert "violates" in page.words
    for named in ("Causes", "Environment", "Laws and regimes", "What it declares", "num_heads", "--seed 0"):
        assert named in page.words
    assert {"wrong", "exact", "within", "scroll"} <= set(page.classes)


def test_the_maps_show_what_the_records_say(records: str) -> None:
    (account,) = read_document([records]).accounts
    heat = operations_by_dtype(account)
    squares = {name: dict(zip(heat.columns, row, strict=True)) for name, row in heat.rows}
    assert set(squares) == {"decode", "merge"}
    for dtype in CASES:
        wrong = squares["decode"][dtype]
        assert (wrong.kind, wrong.text) == ("wrong", "1 of 2")
        assert wrong.ratio is not None
        assert wrong.ratio > 1
        assert squares["merge"][dtype].kind == "wrong"
        assert squares["merge"][dtype].ratio is None
    (record,) = [r for r in account.records if r.law == LAWS[0]]
    regimes = {heat.title: dict(heat.rows) for heat in regimes_by_law(account)}["decode"]
    assert {square.kind for square in regimes[LAWS[0]]} >= {"wrong"}
    assert {square.kind for square in regimes[LAWS[1]]} <= {"exact", "none"}
    for count in record.regimes.values():
        assert 0 <= count["failed"] <= count["cases"]
    assert record.regimes["one query"]["cases"] + record.regimes["several queries"]["cases"] >= record.cases
    places = queries_by_head(record)
    assert places is not None
    assert len(places.columns) == 3, "only three heads are wrong"
    assert "wrong" in places.kinds


def test_the_counts_of_regimes_are_those_of_both_dtypes(records: str) -> None:
    (account,) = read_document([records]).accounts
    merged = {r.law: r for r in account.records}[LAWS[0]].regimes
    parts = [record.regimes for _, record in account.cells if record.law == LAWS[0]]
    for name, count in merged.items():
        assert count["cases"] == sum(part[name]["cases"] for part in parts if name in part)
        assert count["worst"] == max(part[name]["worst"] or 0 for part in parts if name in part)


def test_the_test_results_have_a_case_for_each_cell(records: str, tmp_path: Path) -> None:
    root = ET.fromstring(report(records, "junit", tmp_path))
    (suite,) = root
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert set(cases) == {f"{law}[{dtype}]" for law in (*LAWS, "test_rope_preserves_norm") for dtype in CASES}
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), suite.get("skipped")) == (
        "8",
        "2",
        "2",
        "2",
    )
    failed = cases[f"{LAWS[0]}[float32]"]
    outcome = failed.find("failure")
    assert outcome is not None
    assert "exceeds the bound" in (outcome.text or "")
    properties = {p.get("name"): p.get("value") for p in failed.iter("property")}
    assert properties["smallest case"].startswith("decode:dtype=float32")  # type: ignore[union-attr]
    assert float(properties["error/bound"] or 0) > 1
    crashed = cases[f"{LAWS[2]}[float32]"].find("error")
    assert crashed is not None
    assert crashed.get("type") == "crashed"
    assert "<script>" in (crashed.text or "")
    environment = {p.get("name"): p.get("value") for p in suite.find("properties") or ()}
    assert {"suite", "device", "python, numpy, torch", "supports num_heads"} <= set(environment)


def test_annotations_are_one_line_each(records: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["report", records, "--format", "github"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(re.match(r"::(error|warning|notice) ([^:]*)::\S", line) for line in lines)
    assert "kernel.py" in lines[1]
    assert "%0A" in lines[1]
    assert annotation("error", "a:b,c", "100 %\n::error::x") == "::error title=a%3Ab%2Cc::100 %25%0A::error::x"


def test_the_summary_says_what_is_wrong_and_how_to_see_it(records: str, tmp_path: Path) -> None:
    text = report(records, "markdown", tmp_path)
    lines = text.splitlines()
    assert lines[0].startswith("## ❌ &lt;b&gt;ours&lt;/b&gt; \\| &#64;all \\`x\\` \\#1")
    assert "| decode | 1 of 2 | 1 of 2 |" in text
    assert "mla-spec check " in text
    assert text.count("<details>") == text.count("</details>") >= 3
    outside = re.sub(r"(`{3,})[a-z]*\n.*?\n\1\n", "", text, flags=re.DOTALL)
    assert "<script>" not in outside
    assert "```" not in outside
    widths = {
        line.count("|") - line.count("\\|") for line in lines if line.startswith("| laws that hold") or "1 of 2" in line
    }
    assert len(widths) == 1


def test_no_text_ends_its_block() -> None:
    assert code("a\n```\nb").splitlines()[0] == "````"
    assert md("a|b\n<i> @x #1 _y_") == "a\\|b &lt;i&gt; &#64;x \\#1 \\_y\\_"


def test_waived_failures_are_skipped_and_suspects_are_named(records: str, tmp_path: Path) -> None:
    content = [json.loads(line) for line in Path(records).read_text().splitlines()]
    for line in content:
        if line["type"] == "verdict" and line["verdict"] in ("fail", "crashed"):
            line["waived"] = "known to us (until 2999-01-01)"
    path = tmp_path / "waived.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    (suite,) = ET.fromstring(report(str(path), "junit", tmp_path))
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "0", "6")
    assert "conforms" in report(str(path), "markdown", tmp_path).splitlines()[0]

    suspects = [{"id": "A16", "claim": "the scale is another one", "source": "https://example.org/1"}]
    changed = [
        line | {"suspects": suspects} if line["type"] == "cause" else line
        for line in map(json.loads, Path(records).read_text().splitlines())
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert "the same" not in report(records, "markdown", tmp_path)
    assert "same wrong numbers as A16: the scale is another one <https://example.org/1>" in report(
        str(path), "markdown", tmp_path
    )


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("verdict", {"evidence": [{"case": "decode:dtype=float32"}]}, "what"),
        ("verdict", {"regimes": {"one query": {"cases": -1, "failed": 0, "worst": None}}}, "cases is -1"),
        ("verdict", {"separation": {"is": 1}}, "separation is {'is': 1}; expected a field"),
        ("cause", {"suspects": [{"id": "A16"}]}, "claim"),
        ("cause", {"laws": "all"}, "laws is 'all'; expected a list"),
    ],
)
def test_what_is_no_record_is_refused_in_one_sentence(
    kind: str, change: dict[str, Any], message: str, records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in Path(records).read_text().splitlines()]
    number = next(i for i, line in enumerate(lines) if line["type"] == kind)
    lines[number] |= change
    path, out = tmp_path / "bad.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(path), "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f":{number + 1}" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_evidence_of_another_operation_or_axis_is_refused(records: str, tmp_path: Path) -> None:
    text = Path(records).read_text()
    found = re.search(r'"case": "(decode:[^"]*)", "what"', text)
    assert found is not None
    for old, new in ((found[1], "nothing:x=1"), ('"where": {', '"where": {"9": [[0, 0]], ')):
        path = tmp_path / "bad.jsonl"
        path.write_text(text.replace(old, new))
        assert main(["report", str(path)]) == 2


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert main(["report", str(tmp_path / "empty"), "-o", str(tmp_path / "no" / "folder")]) == 2
    assert [line.startswith("mla-spec: ") for line in capsys.readouterr().err.splitlines()] == [True] * 3


def test_records_come_back_as_they_were(records: str) -> None:
    (run,) = read_records(records)
    raw = [json.loads(line) for line in Path(records).read_text().splitlines()]
    for line, before in zip(run.verdicts, [each for each in raw if each["type"] == "verdict"], strict=True):
        after = line.record.as_dict()
        assert {name: after[name] for name in ("evidence", "regimes", "separation")} == {
            name: before[name] for name in ("evidence", "regimes", "separation")
        }


WIDTHS = (390, 1280)


@pytest.mark.skipif(shutil.which("chromedriver") is None or shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window_of_a_browser(width: int, records: str, tmp_path: Path) -> None:
    from tests.front.reports.browser import Browser

    (tmp_path / "report.html").write_text(report(records, "html", tmp_path), encoding="utf-8")
    with Browser(width, 800) as browser:
        browser.open((tmp_path / "report.html").as_uri())
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.run("return window.innerWidth") == width
        assert browser.run("return document.documentElement.scrollWidth") <= width
        reach = "return Math.max(...[...document.querySelectorAll('main > section, article, pre, dl, summary')]"
        assert browser.run(f"{reach}.map(e => e.getBoundingClientRect().right))") <= width
        red = browser.run("return getComputedStyle(document.querySelector('td.wrong')).backgroundColor")
        assert red not in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)")
        assert browser.run("return document.querySelector('h1').innerText").startswith("<b>ours</b>")
        assert browser.run("return [...document.querySelectorAll('td.wrong')].every(e => e.clientHeight > 5)")
        browser.run("document.querySelectorAll('.scroll').forEach(d => d.style.overflow = 'visible')")
        assert (browser.run("return document.documentElement.scrollWidth") > width) == (width < 500)
