"""The sensitivity card finds the smallest fault that a law detects, and says when none does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.profile_presets import preset
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.emulated import EmulatedKernel
from mla_spec.proof.faults import FAULTS, Fault
from mla_spec.proof.sensitivity import (
    Sensitivity,
    detectors_of,
    draw_cases,
    report,
    sensitivity_card,
)
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.find import resolve_subject
from mla_spec.subjects.process import apart
from mla_spec.subjects.supports import Supports

LAWS = ("test_decode_agrees_with_reference", "test_decode_lse_agrees_with_reference")
"""The laws that detect here, so that the tests are quick."""
BY_NAME = {fault.name: fault for fault in FAULTS}
SCALE = "softmax scale too large by the factor 1 + {}"
LOST, EXTRA = "last key lost from {} keys on", "one key too many from {} keys on"


class Absorbed(TorchAbsorbed):
    """Takes small cases only, so that the tests are quick."""

    supports = Supports(dtypes=("float32", "bfloat16"), latent_dims=((16, 8),), num_heads=(2,), page_sizes=(16,))


class WithoutLSE(Absorbed):
    """Returns no LSE."""

    supports = replace(Absorbed.supports, lse=False)

    def decode(self, *tensors: Any, **options: Any) -> Any:
        return super().decode(*tensors, **options)[0], None


def card(subject: Any, *names: str, dtype: str = "bfloat16", count: int = 6) -> dict[str, Sensitivity]:
    rows = sensitivity_card(subject, dtypes=[dtype], count=count, laws=LAWS, faults=[BY_NAME[name] for name in names])
    return {row.fault: row for row in rows}


def test_faults_of_any_subject_are_detected_where_the_contract_needs_it() -> None:
    """0.1 % of the scale in bfloat16, a key of 4096, one position of rope, 1e-3 of the LSE."""
    rows = card(Absorbed(), SCALE, LOST, EXTRA, "rope off by {} positions", "LSE too large by {}")
    for name, least in ((SCALE, 1e-3), ("rope off by {} positions", 1.0), ("LSE too large by {}", 1e-3)):
        assert isinstance(rows[name].smallest, float) and rows[name].smallest <= least, rows[name]
    assert rows[LOST].smallest == rows[EXTRA].smallest == 4096


def test_scale_in_float32_is_checked_to_a_hundred_thousandth() -> None:
    smallest = card(Absorbed(), SCALE, dtype="float32")[SCALE].smallest
    assert isinstance(smallest, float) and smallest <= 1e-5


def test_arithmetic_other_than_declared_is_detected() -> None:
    rows = card(Absorbed(), "P in {}", "P·V accumulated in {}", "q·k accumulated in {}", "output truncated")
    assert rows["P·V accumulated in {}"].smallest in ("bfloat16", "float16")
    assert rows["q·k accumulated in {}"].smallest in ("bfloat16", "float16")
    assert rows["output truncated"].smallest == ""
    flash = EmulatedKernel({"bfloat16": preset("bf16-flash")})
    assert card(flash, "P in {}")["P in {}"].smallest == "float8_e4m3fn"


@pytest.mark.parametrize("name", [SCALE, LOST])
def test_case_of_the_card_shows_the_fault_and_only_the_fault(name: str) -> None:
    subject = Absorbed()
    row = card(subject, name)[name]
    options = Options(case=parse_case(row.case))
    faulty = BY_NAME[name].make(subject, "bfloat16", row.smallest)
    assert run_law(all_laws()[row.law], faulty, options).verdict == "fail"
    assert run_law(all_laws()[row.law], subject, options).verdict == "pass"


def test_smaller_faults_than_the_smallest_detected_pass() -> None:
    row = card(Absorbed(), "output too large by the factor 1 + {}").popitem()[1]
    assert row.smallest in row.grades
    below = row.grades[row.grades.index(row.smallest) + 1]
    faulty = BY_NAME[row.fault].make(Absorbed(), "bfloat16", below)
    detectors = detectors_of(Absorbed(), "bfloat16", 6, 0, LAWS)
    assert [d.law.name for d in detectors if d.detect(faulty, "bfloat16")] == []


def test_what_is_no_fault_of_the_subject_has_no_row() -> None:
    assert card(WithoutLSE(), "LSE too large by {}") == {}
    truncating = EmulatedKernel({"bfloat16": replace(preset("bf16-flash"), output_rounding="truncate")})
    assert card(truncating, "output truncated") == {}
    narrow = EmulatedKernel({"bfloat16": Profile.default("bfloat16", probabilities="float8_e5m2")})
    assert card(narrow, "P in {}") == {}


def test_fault_that_no_law_detects_is_said_to_be_undetected() -> None:
    harmless = Fault("nothing wrong by {}", (1.0, 0.5), lambda subject, dtype, grade: subject)
    (row,) = sensitivity_card(Absorbed(), dtypes=["float32"], count=2, laws=LAWS, faults=[harmless])
    assert (row.smallest, row.law, row.cases) == (None, "", 0)
    assert report([row]).splitlines()[1].split() == [
        "nothing",
        "wrong",
        "by",
        "x",
        "float32",
        "none",
        "1.0",
        "..",
        "0.5",
    ]


def test_laws_that_the_subject_breaks_detect_nothing() -> None:
    class Wrong(Absorbed):
        def scores(self, q: Any, k: Any, softmax_scale: float) -> Any:
            return super().scores(q, k, 1.1 * softmax_scale)

    laws = (*LAWS, "test_decode_does_not_modify_its_inputs")
    right, wrong = ({d.law.name for d in detectors_of(s, "float32", 4, 0, laws)} for s in (Absorbed(), Wrong()))
    assert right == set(laws)
    assert wrong == {"test_decode_does_not_modify_its_inputs"}


def test_drawn_cases_repeat() -> None:
    made, profile = all_laws()[LAWS[0]], Profile.default("float32")
    first = draw_cases(made, Supports(), profile, 5, seed=1)
    assert len(first) == 5
    assert first == draw_cases(made, Supports(), profile, 5, seed=1)
    assert first != draw_cases(made, Supports(), profile, 5, seed=2)


def test_miscounted_keys_are_those_of_long_sequences_only() -> None:
    case = DecodeCase(dtype="float32", seqlens=(63, 64), kv_lora_rank=4, page_size=16, num_heads=2)
    inputs = case.build()
    subject = Absorbed()
    right, _ = Driver(subject, "float32").call(DECODE, inputs)
    for name, length in ((LOST, 63), (EXTRA, 65)):
        miscounted = replace(inputs, cache_seqlens=np.array([63, length], dtype=np.int32))
        same, _ = Driver(subject, "float32").call(DECODE, miscounted)
        wrong, _ = Driver(BY_NAME[name].make(subject, "float32", 64), "float32").call(DECODE, inputs)
        assert (wrong.bits == same.bits).all()
        assert (wrong.bits[1] != right.bits[1]).any()


def test_rotation_by_no_position_changes_nothing() -> None:
    inputs = DecodeCase(dtype="float32", seqlens=(9,), kv_lora_rank=4, qk_rope_head_dim=4).build()
    subject = Absorbed()
    outs = [
        Driver(made, "float32").call(DECODE, inputs)[0].value
        for made in (subject, *(BY_NAME["rope off by {} positions"].make(subject, "float32", n) for n in (0.0, 1.0)))
    ]
    assert (outs[0] == outs[1]).all()
    assert np.abs(outs[0] - outs[2]).max() > 1e-3


def test_command_prints_the_card_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, appended = tmp_path / "card.json", tmp_path / "rows.jsonl"
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "from mla_spec.adapters.pytorch import TorchAbsorbed\n"
        "from mla_spec import Supports\n"
        "class Small(TorchAbsorbed):\n"
        "    supports = Supports(dtypes=('float32',), latent_dims=((4, 2),), num_heads=(1,), max_s=1)\n"
    )
    files = ["--json", str(path), "--records", str(appended)]
    laws = [word for law in LAWS for word in ("--law", law)]
    assert main(["sensitivity", f"{kernel}:Small", "--cases", "1", *laws, *files]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["fault", "dtype", "smallest", "detected", "of", "law", "cases"]
    written = json.loads(path.read_text())
    assert len(written) == len(rows) == len(FAULTS)
    assert written[0]["fault"] == SCALE
    assert written[0]["dtype"] == "float32"
    assert [json.loads(line) for line in appended.read_text().splitlines()] == written


SMALL = """
import os
from mla_spec import Supports
from mla_spec.adapters.pytorch import TorchAbsorbed

class Small(TorchAbsorbed):
    supports = Supports(dtypes=("float32",), latent_dims=((4, 2),), num_heads=(1,), max_s=1)

class Ends(Small):
    def decode(self, q, kv_cache, block_table, cache_seqlens, **options):
        if set(cache_seqlens.tolist()) & {63, 255, 1023, 4095}:
            os._exit(0)
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)
"""


def test_a_subject_in_a_process_of_its_own_has_the_same_card(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    faults = [BY_NAME[name] for name in (SCALE, LOST, "P in {}")]
    spec = f"{tmp_path}/small.py:Small"
    with apart(spec) as subject:
        rows = sensitivity_card(subject, count=3, laws=LAWS, faults=faults)
    assert rows == sensitivity_card(resolve_subject(spec), count=3, laws=LAWS, faults=faults)
    assert all(row.smallest is not None for row in rows)


def test_a_fault_that_ends_the_process_is_detected(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    with apart(f"{tmp_path}/small.py:Ends") as subject:
        (row,) = sensitivity_card(
            subject, count=2, laws=["test_decode_does_not_modify_its_inputs"], faults=[BY_NAME[LOST]]
        )
    assert row.smallest == 4096


def test_faults_are_looked_for_on_the_device_that_is_named() -> None:
    """A meta tensor has no values, so that on this device no law can hold, and none is left to detect a fault."""
    assert detectors_of(Absorbed(), "float32", 1, 0, LAWS)
    assert not detectors_of(Absorbed(), "float32", 1, 0, LAWS, "meta")


def test_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "torch-absorbed", "--dtype", "float8"]) == 2
    assert "does not support float8; it supports float64, float32" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not offer decode"):
        sensitivity_card(torch.nn.Identity())
