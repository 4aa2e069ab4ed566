"""The screen that says what came of a check."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.front.overview import overview, short_replay
from mla_spec.front.run import Progress
from mla_spec.installed import all_laws
from mla_spec.judging.anatomy import anatomy_of
from mla_spec.judging.causes import causes
from mla_spec.judging.plan import Cell
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.operations.decode import DecodeCase
from mla_spec.text.layout import Screen

CASE = DecodeCase(dtype="float32", seqlens=(65,), num_heads=128, kv_lora_rank=512, qk_rope_head_dim=64, page_size=64)
WANT = np.linspace(1, 2, 12).reshape(1, 1, 2, 6)


def passed(law: str) -> Record:
    return Record(law, "mine", "pass", cases=9, worst=0.5, dtypes={"float32": "pass", "bfloat16": "pass"})


def failed(law: str, **changes: Any) -> Record:
    evidence = [{"case": CASE.id, **anatomy_of("out", 0.414 * WANT, WANT, 0 * WANT + 1e-6)}]
    record = Record(law, "mine", "fail", cases=2, message="wrong\nindeed", case=CASE.id, evidence=evidence)
    replay = f"mla-spec check pkg.module:Kernel --law {law} --case {CASE.id}"
    separation = {"field": "longest of seqlens", "least": 65, "failing": 3, "passing": 0, "elsewhere": 9}
    dtypes = {"float32": "fail", "bfloat16": "pass"}
    return replace(record, replay=replay, separation=separation, dtypes=dtypes, **changes)


DECODE = [name for name, law in all_laws().items() if "decode" in law.needs]
RECORDS = [failed(name) if name in DECODE else passed(name) for name in all_laws()]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    found = causes(RECORDS)
    for cause in found:
        cause.suspects.append({"id": "F22", "claim": "the second tile is wrong " * 5, "source": f"https://{'x' * 30}"})
    text = overview(RECORDS, Screen(width), found)
    assert max(map(len, text.splitlines())) <= width


def test_one_fault_fits_a_screen_of_24_lines() -> None:
    text = overview(RECORDS, Screen(80))
    lines = text.splitlines()
    assert len(lines) <= 22, "two lines above say what the subject declares"
    assert lines[0].startswith(f"violates: {len(DECODE)} of {len(RECORDS)} laws fail, by 1 cause ")
    joined = " ".join(" ".join(lines).split())
    assert "of decode" in joined
    assert (
        "out is 0.414 times what it should be, in every element, only where longest of seqlens is at least 65" in joined
    )
    assert f"0 of {len([n for n in DECODE if all_laws()[n].needs[0] == 'decode'])}"[:2] in joined


def test_a_later_cause_that_looks_like_the_first_is_one_line() -> None:
    records = [failed("test_decode_agrees_with_reference"), failed("test_quantised_decode_agrees_with_reference")]
    found = causes(records)
    assert len(found) == 2
    for cause in found:
        cause.suspects.append({"id": "F22", "claim": "The page is looked up for every other page only."})
    lines = overview(records, Screen(80), found).splitlines()
    assert lines[-1] == "2. 1 law of decode_quantized: the same wrong numbers as F22 too"
    found[1].suspects.clear()
    assert "out is 0.414 times" in " ".join(overview(records, Screen(80), found).splitlines()[-2:])


def test_what_holds_is_one_row_an_operation() -> None:
    text = overview([passed(name) for name in all_laws()], Screen(80))
    rows = [line.split() for line in text.splitlines()]
    ropes = sum(law.needs[0] == "rope" for law in all_laws().values())
    assert ["rope", str(ropes), str(ropes), "0.500"] in rows
    assert text.startswith("conforms: ")


def test_what_cannot_be_judged_and_what_does_not_apply_is_said() -> None:
    unclear = Record("test_rope_preserves_norm", "mine", "incomplete", cases=1, message="no memory")
    absent = Record("test_merge_is_associative", "mine", "unsupported", message="does not offer merge")
    text = overview([unclear, absent], Screen(80))
    assert text.startswith("incomplete: 1 of 1 laws could not be judged")
    assert "not judged: test_rope_preserves_norm: no memory" in text
    assert "1 law do not apply: does not offer merge" not in text
    assert "1 law does not apply: does not offer merge" in text


def test_the_command_runs_the_same_case_and_can_be_copied() -> None:
    record = failed(DECODE[0])
    command = short_replay(record)
    assert len(command) < len(record.replay)
    assert parse_case(shlex.split(command)[-1]) == CASE
    for width in (40, 60, 80):
        lines = Screen(width).command(command)
        assert max(map(len, lines)) <= width
        assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)


def test_progress_says_rate_and_time_left() -> None:
    progress, cell = Progress(10), Cell(("pkg:Kernel",), "test_rope_preserves_norm", "float32")
    assert progress.text(cell, 1.0).startswith("[0/10] test_rope_preserves_norm")
    judged = [(cell, passed(cell.law))] * 4
    assert list(progress.counted(judged)) == judged
    assert progress.text(cell, 80.0).startswith("[4/10, 0.1/s, 2:00 left] test_rope_preserves_norm")


def test_colors_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert Screen.of(Terminal()) == Screen(100, True)
    assert "\x1b[" in overview(RECORDS, Screen(80, True))
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen.of(Terminal()) == Screen(100, False)
    assert Screen.of(io.StringIO()) == Screen(80, False)


def test_refused_cases_are_one_sentence() -> None:
    records = [
        Record(law, "k", "pass", cases=4, note="1 of 4 cases refused by the subject: no YaRN\nsampled")
        for law in ("test_rope_agrees_with_reference", "test_rope_preserves_norm")
    ]
    text = overview(records, Screen(120))
    assert "2 of 8 cases of 2 laws refused by the subject: no YaRN" in text
    assert "test_rope_preserves_norm: sampled" in text
    assert text.count("refused") == 1
