"""The sizes for which an operation is right, refuses, or is silently wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.envelope import MAPPED, Cell, Kind, envelope, kind_of, lattice_of
from mla_spec.subjects.supports import Supports

KERNEL = """
import os
from mla_spec import Supports
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel:
    name = "<mine>"
    supports = Supports(num_heads=(1, 2), latent_dims=((4, 2),), dtypes=("float32",))
    ends = False

    def decode(self, q, kv_cache, *arguments, **options):
        if q.shape[2] == 3:
            if self.ends:
                os._exit(7)
            raise ValueError("no three heads | at all")
        out, lse = TorchAbsorbed().decode(q, kv_cache, *arguments, **options)
        return out * (0.5 if kv_cache.shape[1] == 16 and q.shape[1] == 2 else 1), lse

class Ends(Kernel):
    ends = True
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of kernels, and a lattice that is small enough to be judged for real."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    small = replace(
        lattice_of(DECODE),
        axes={"heads": (1, 2, 3), "queries": (1, 2), "page": (2, 16)},
        classes=("one key", "a key beyond a page"),
    )
    monkeypatch.setitem(MAPPED, "decode", replace(DECODE, lattice=small))
    return str(tmp_path / "kernel.py")


def test_each_size_is_right_refused_or_silently_wrong(kernel: str, tmp_path: Path) -> None:
    page, data = tmp_path / "map.md", tmp_path / "map.json"
    assert main(["map", f"{kernel}:Kernel", "-o", str(page), "--json", str(data)]) == 1
    content = json.loads(data.read_text())
    assert (content["schema"], content["version"], content["subject"]) == ("mla-spec-map", 2, "<mine>")
    assert content["about"]["code"].startswith("SHA-256 ")
    assert content["axes"]["decode"]["heads"] == [1, 2, 3]
    assert len(content["cells"]) == 2 * 3 * 2 * 2
    for cell in content["cells"]:
        expected = (
            "refuses" if cell["heads"] == 3 else "wrong" if (cell["queries"], cell["page"]) == (2, 16) else "right"
        )
        assert cell["kind"] == expected, cell
        assert cell["declared"] == (cell["heads"] < 3)
        if cell["measured"]:
            case = parse_case(cell["case"])
            assert isinstance(case, DecodeCase)
            assert (case.num_heads, case.s, case.page_size) == (cell["heads"], cell["queries"], cell["page"])
            assert case.kv_lora_rank == 4
        if cell["kind"] == "wrong" and cell["measured"]:
            assert cell["ratio"] > 1
    text = page.read_text()
    assert "# Envelope of decode of &lt;mine&gt;" in text
    assert "4 silently wrong, 8 refuses, 12 right" in text
    assert "| decode | float32 | one key | 6 | 4 |  |  | 2 |" in text


def test_a_kernel_that_ends_its_process_does_not_refuse(kernel: str, tmp_path: Path) -> None:
    data = tmp_path / "map.json"
    assert main(["map", f"{kernel}:Ends", "-o", str(tmp_path / "map.md"), "--json", str(data)]) == 1
    cells = json.loads(data.read_text())["cells"]
    assert {cell["kind"] for cell in cells if cell["heads"] == 3} == {"ends the process"}


def test_two_maps_differ_in_the_lines_of_the_cells_that_changed(kernel: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    asked = ["--dtype", "float32", "-o", str(tmp_path / "map.md"), "--json"]
    main(["map", f"{kernel}:Kernel", *asked, str(old)])
    main(["map", f"{kernel}:Kernel", *asked, str(new)])
    assert old.read_text() == new.read_text()
    (tmp_path / "kernel.py").write_text(KERNEL.replace("shape[2] == 3", "shape[2] == 4"))
    main(["map", f"{kernel}:Kernel", *asked, str(new)])
    changed = [a for a, b in zip(old.read_text().splitlines(), new.read_text().splitlines(), strict=True) if a != b]
    assert all('"heads": 3' in line or line.startswith('"about"') for line in changed)
    assert len(changed) > 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch-absorbed", "--dtype", "float7"], "unknown dtype 'float7'"),
        (
            ["torch-absorbed", "--operation", "merge"],
            "--operation 'merge' is not mapped; those that are: rope, prefill",
        ),
        (["nothing.py:Kernel"], "nothing.py"),
        (["torch-absorbed", "-o", "no/such/folder.md"], "--output"),
    ],
)
def test_what_cannot_be_mapped_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_subject_without_decode_has_no_envelope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rope.py").write_text("class R:\n    def rope(self, x, positions, *, rope):\n        return x\n")
    assert main(["map", f"{tmp_path / 'rope.py'}:R", "--operation", "decode"]) == 2
    assert "R does not offer decode" in capsys.readouterr().err


Truth = Callable[[int, int, int], Kind]


def mapped(truth: Truth) -> list[Cell]:
    """The whole lattice of one dtype and class of lengths, judged by what is true of each size."""

    def judge(case: Case) -> Record:
        assert isinstance(case, DecodeCase)
        kind = truth(case.num_heads, case.s, case.page_size)
        verdicts = {"right": ("pass", ""), "wrong": ("fail", "wrong"), "refuses": ("crashed", "ValueError: no")}
        verdict, message = verdicts[kind]
        return Record("law", "s", verdict, message=message, case=case.id)  # type: ignore[arg-type]

    return next(iter(envelope(DECODE, judge, Supports(), ("float32",))))


@pytest.mark.parametrize(
    "truth",
    [
        lambda heads, queries, page: "right",
        lambda heads, queries, page: "refuses" if heads > 64 else "right",
        lambda heads, queries, page: "wrong" if heads > 24 else "refuses" if page < 16 else "right",
        lambda heads, queries, page: "wrong" if (heads > 16 and queries > 2 and page > 32) else "right",
    ],
)
def test_boundaries_are_found_wherever_they_run(truth: Truth) -> None:
    cells = mapped(truth)
    assert [tuple(cell.sizes.values()) for cell in cells] == list(product(*lattice_of(DECODE).axes.values()))
    assert [cell for cell in cells if cell.kind != truth(*cell.sizes.values())] == []


def test_a_uniform_box_is_judged_in_its_corners_and_its_middle() -> None:
    assert sum(cell.measured for cell in mapped(lambda *sizes: "right")) == 9
    assert 9 < sum(cell.measured for cell in mapped(lambda heads, *_: "wrong" if heads > 16 else "right")) < 100


def corner(name: str, index: int, part: str) -> tuple[dict[str, int], Case]:
    """Sizes at one end of every axis, and the case of a class."""
    operation = MAPPED[name]
    sizes = {axis: values[index] for axis, values in lattice_of(operation).axes.items()}
    fields = lattice_of(operation).fields(Supports(), part, sizes)
    return sizes, operation.case(dtype="float32", **fields)


PARTS = [(name, part) for name, operation in MAPPED.items() for part in lattice_of(operation).classes]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_the_law_of_each_lattice_judges_its_smallest_cases(name: str, part: str) -> None:
    law = all_laws()[lattice_of(MAPPED[name]).law]
    _, case = corner(name, 0, part)
    record = run_law(law, TorchAbsorbed(), Options(case=case, minimise=False))
    assert record.verdict == "pass", record.message
    assert parse_case(case.id) == case


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_what_is_declared_is_told_from_what_is_not(name: str, part: str) -> None:
    declared = lattice_of(MAPPED[name]).declared
    small, large = corner(name, 0, part)[0], corner(name, -1, part)[0]
    assert declared(Supports(), part, small)
    assert declared(Supports(), part, large)
    narrow = {
        "rope": Supports(rope_layouts=("half" if part.startswith("interleaved") else "interleaved",)),
        "decode_quantized": Supports(page_sizes=(1,)),
    }.get(name, Supports(num_heads=(1,)))
    assert not declared(narrow, part, large)


def test_every_operation_that_is_offered_is_mapped(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = MAPPED["rope"]
    small = replace(lattice_of(rope), axes={"heads": (1, 2), "dims": (2, 8), "tokens": (1, 3)}, classes=("half",))
    monkeypatch.setitem(MAPPED, "rope", replace(rope, lattice=small))
    source = (
        Path(kernel).read_text().replace("    ends = False\n", "    ends = False\n    rope = TorchAbsorbed().rope\n")
    )
    Path(kernel).write_text(source)
    page, data = tmp_path / "map.html", tmp_path / "map.json"
    assert main(["map", f"{kernel}:Kernel", "-o", str(page), "--json", str(data)]) == 1
    content = json.loads(data.read_text())
    assert content["axes"]["rope"] == {
        "dtype": ["float32"],
        "layout": ["half"],
        "heads": [1, 2],
        "dims": [2, 8],
        "tokens": [1, 3],
    }
    assert {cell["kind"] for cell in content["cells"] if cell["operation"] == "rope"} == {"right"}
    assert {cell["length"] for cell in content["cells"] if cell["operation"] == "decode"} == {
        "one key",
        "a key beyond a page",
    }
    assert "Envelope of rope, decode" in page.read_text()
    assert main(["map", f"{kernel}:Kernel", "--operation", "rope", "-o", str(page)]) == 0
    assert "Envelope of rope:" in page.read_text()


@pytest.mark.parametrize(
    ("verdict", "message", "kind"),
    [
        ("pass", "", "right"),
        ("fail", "out is wrong", "wrong"),
        ("crashed", "ValueError: cannot process this", "refuses"),
        ("unsupported", "refused by the subject", "refuses"),
        ("crashed", "the process was killed by SIGSEGV", "ends the process"),
        ("crashed", "did not return within 3 s", "ends the process"),
        ("incomplete", "says nothing", "not judged"),
    ],
)
def test_only_an_exception_refuses(verdict: str, message: str, kind: str) -> None:
    assert kind_of(Record("law", "s", verdict, message=message)) == kind  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("chromedriver") is None or shutil.which("chromium") is None, reason="no chromium here")
def test_the_page_fits_a_phone(kernel: str, tmp_path: Path) -> None:
    from tests.front.reports.browser import Browser
    from tests.front.reports.test_reports import Page

    path = tmp_path / "map.html"
    assert main(["map", f"{kernel}:Kernel", "-o", str(path)]) == 1
    page = Page(path.read_text())
    assert page.open == []
    assert Counter(page.classes)["wrong"] >= 4
    with Browser(390, 800) as browser:
        browser.open(path.as_uri())
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        assert browser.run("return document.querySelector('h1').innerText") == "<mine>"
