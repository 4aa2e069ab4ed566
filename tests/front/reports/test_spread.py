"""Pictures of how errors are distributed."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from mla_spec.front.cli import main
from mla_spec.front.reports.account import read_document
from mla_spec.front.reports.spread import HEIGHT, picture, pictures, spreads

ROUNDED = 0.05
"""A coordinate is written with one decimal."""

COUNTS = {"-1": 10, "-2": 30, "-20": 40, "exact": 20}


def heights(figure: str) -> list[float]:
    return [float(rect.get("height") or 0) for rect in ET.fromstring(figure).iter("rect")]


def test_bars_are_as_high_as_their_shares() -> None:
    figure = picture("bound", "decode <x>, float32", COUNTS)
    low, middle, high = sorted(heights(figure))
    assert abs(middle - 3 * low) <= (1 + 3) * ROUNDED
    assert abs(high - 4 * low) <= (1 + 4) * ROUNDED
    assert max(heights(figure)) < HEIGHT
    assert "decode &lt;x&gt;, float32: error / bound" in figure
    assert "100 elements, 20% without an error, the others up to 1 of the bound" in figure
    assert "<polyline" not in figure


def test_what_is_seen_once_in_millions_is_drawn() -> None:
    assert min(heights(picture("bound", "rope, bfloat16", {"-1": 10_000_000, "-5": 1}))) == 1
    assert "&gt; 99% without an error" in picture("bound", "rope, float16", {"exact": 10_000_000, "-5": 1})


def test_the_curve_is_the_distribution_of_a_normal_error_of_the_declared_size() -> None:
    figure = ET.fromstring(picture("predicted", "decode, float32", {"0": 1}))
    (line,) = figure.iter("polyline")
    y = [float(point.split(",")[1]) for point in (line.get("points") or "").split()]
    (bar,) = heights(ET.tostring(figure, encoding="unicode"))
    bottom = max(y)
    between = math.erf(2 / math.sqrt(2)) - math.erf(
        1 / math.sqrt(2)
    )  # |x| from 1 to 2: bin "0", where all elements are
    assert abs((bottom - y[20]) - between * bar) <= (2 + between) * ROUNDED
    assert "largest deviation that is declared" in "".join(figure.itertext())
    assert "the others above 8 of" in picture("predicted", "decode, float32", {"3": 1, "exact": 1})


def test_nothing_is_drawn_of_nothing() -> None:
    assert pictures({}) == pictures({("decode", "float32"): {"bound": {}}}) == ""


def test_a_run_has_a_picture_of_each_operation_and_dtype(tmp_path: Path) -> None:
    records, page = tmp_path / "run.jsonl", tmp_path / "page.html"
    laws = ["--law", "test_rope_agrees_with_reference", "--law", "test_decode_error_is_as_small_as_declared"]
    asked = ["--dtype", "float32", "--dtype", "float16", "--examples", "8", "--seed", "0", "--in-process"]
    assert main(["check", "torch-absorbed", *laws, *asked, "--records", str(records)]) == 0
    (account,) = read_document([str(records)]).accounts
    assert set(spreads(account)) == {(name, dtype) for name in ("rope", "decode") for dtype in ("float32", "float16")}
    assert main(["report", str(records), "--format", "html", "-o", str(page)]) == 0
    labels = re.findall(r'aria-label="([^"]*): error / ([a-z ]*)\.', page.read_text(encoding="utf-8"))
    assert labels == [
        ("rope, float32", "bound"),
        ("rope, float16", "bound"),
        ("decode, float32", "predicted deviation"),
        ("decode, float16", "predicted deviation"),
    ]
