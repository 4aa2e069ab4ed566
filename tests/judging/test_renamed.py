"""An earlier name of a law still means the law, and says how it is called now."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_spec.front.pytest_plugin import read_xfails
from mla_spec.installed import all_laws
from mla_spec.judging.check import find_laws
from mla_spec.judging.renamed import RENAMED, RenamedLaw


@pytest.mark.parametrize("old", RENAMED)
def test_every_earlier_name_finds_a_law_of_today(old: str) -> None:
    assert old not in all_laws()
    with pytest.warns(RenamedLaw, match=f"law {old} is now called {RENAMED[old]}"):
        (law,) = find_laws([old])
    assert law.name == RENAMED[old]


def test_waivers_keep_their_subject(tmp_path: Path) -> None:
    old, new = next(iter(RENAMED.items()))
    (tmp_path / "waived.txt").write_text(f"{old}[my.py:Kernel]  # known\n{new}\n", encoding="utf-8")
    with pytest.warns(RenamedLaw):
        assert read_xfails(str(tmp_path / "waived.txt")) == [f"{new}[my.py:Kernel]", new]
