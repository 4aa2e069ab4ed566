"""What golden/README.md says of pages is where the exact computation finds them."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from mla_spec.golden.exact.rationals import LAYOUTS, Layout

README = Path(__file__).resolve().parents[2] / "golden" / "README.md"
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in README.read_text(encoding="utf-8").partition("## Pages")[2].partition("\n## ")[0].splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 7 and cells[0].startswith("`")
}


def test_every_layout_has_a_row() -> None:
    assert set(ROWS) == set(LAYOUTS)


def formula(cell: str) -> str | None:
    """The last expression of a cell, None where it has none."""
    found = re.findall(r"`([^`]*)`", cell)
    return found[-1] if found and re.search(r"[tS*]", found[-1]) and "_" not in found[-1] else None


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_says_where_everything_is(name: str) -> None:
    layout: Layout = LAYOUTS[name]
    codes, group, page, code, scale, plain = ROWS[name]
    assert codes == f"{layout.codes} `{layout.code_format}`"
    assert int(group) == layout.group
    for cell, place in ((code, layout.code), (scale, layout.scale), (plain, layout.plain)):
        said = formula(cell)
        assert (said is None) == (place is None)
        for t, i, size in product((0, 1, 5), (0, 1, 7, 13), (6, 64)):
            if said is not None and place is not None:
                assert eval(said, {"t": t, "i": i, "S": size}) == place(t, i, size)
    for size in (1, 2, 6, 64):
        assert eval(page.strip("`"), {"S": size}) == layout.page(size)
    if layout.scale is not None:
        assert scale.startswith(f"`{layout.scale_format}`")
    if layout.plain is not None:
        assert plain.startswith(f"{layout.plains} `{layout.plain_format}`")
