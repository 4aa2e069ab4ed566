"""Where P has 8 bits the probable bound carries the gate, and the report says so."""

from __future__ import annotations

import pytest

from mla_spec import Options, check_subject
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.judging.run import run_law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.emulated import EmulatedKernel, Schedule

FP8 = Profile.default("bfloat16", tile=64, probabilities="float8_e4m3fn", probabilities_scale=256.0)
AGREES = "test_decode_agrees_with_reference"


def test_a_kernel_with_p_in_8_bits_gets_a_verdict_that_says_what_it_rests_on() -> None:
    (record,) = check_subject(EmulatedKernel({"bfloat16": FP8}), laws=[AGREES], options=Options(examples=5))
    assert record.verdict == "pass"
    assert record.note.startswith("P in float8_e4m3fn may move an output by more than 5 %: ")
    assert record.worst is not None and record.worst > 0.1


def test_truncation_of_p_in_8_bits_is_found() -> None:
    wrong = EmulatedKernel({"bfloat16": FP8}, Schedule(truncate_probabilities=True))
    (record,) = check_subject(wrong, laws=[AGREES], options=Options(examples=5, minimise=False))
    assert record.verdict == "fail"


@pytest.mark.parametrize(("keys", "verdict"), [(5, "incomplete"), (2000, "pass")])
def test_short_rows_alone_are_no_pass(keys: int, verdict: str) -> None:
    case = DecodeCase(dtype="bfloat16", seqlens=(keys,), kv_lora_rank=8)

    @law(needs=DECODE, cases=lambda *_: [case])
    def test_one_case(run: Run, case: DecodeCase) -> None:
        """One."""
        inputs = case.build()
        run.agrees(DECODE, inputs, run.call(DECODE, inputs))

    record = run_law(test_one_case.law, EmulatedKernel({"bfloat16": FP8}), Options())  # type: ignore[attr-defined]
    assert record.verdict == verdict
    assert "no case is long enough" in record.message or verdict == "pass"
