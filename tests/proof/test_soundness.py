"""Soundness runs repeat, report what lies outside a bound, and lose nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from mla_spec.bounds.kernel_presets import all_presets
from mla_spec.bounds.profile import Profile
from mla_spec.front.cli import main
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.soundness import (
    HonestCase,
    Ratios,
    draw_case,
    exit_code,
    judge_case,
    report,
    run_soundness,
)


def lying(index: int, profile: Profile, schedule: dict[str, bool] | None = None) -> HonestCase:
    """Case ``index`` with ordinary scores, of a kernel that declares ``profile`` and truncates P."""
    case = draw_case(0, index)
    inputs = replace(case.inputs, dtype=profile.dtype, logit_std=1.0)
    return replace(case, profile=profile, schedule=schedule or {"truncate_probabilities": True}, inputs=inputs)


def test_honest_kernels_stay_within_their_bounds() -> None:
    judged = run_soundness(100, seed=3)
    assert [j.index for j in judged] == list(range(100))
    assert exit_code(judged, 100) == 0
    assert all(j.out.worst <= 1 and j.lse.worst <= 1 for j in judged)
    # The bounds are not so wide that anything would pass.
    assert max(j.out.worst for j in judged) > 0.5
    assert max(j.lse.worst for j in judged) > 0.25
    assert sum(j.out_probable.elements for j in judged) > 0


def test_kernel_that_truncates_p_leaves_a_bound() -> None:
    """Weights are 1/2, 1/3, ...: each row of a few keys loses up to a whole roundoff of P, where half a one is declared."""
    profile = Profile.default("float32", probabilities="bfloat16", tile=64)
    judged = [judge_case(lying(index, profile)) for index in range(80)]
    assert any(j.out_probable.outside for j in judged)
    assert exit_code(judged, 80) == 1
    honest = [judge_case(lying(index, profile, {"exp2": True})) for index in range(80)]
    assert exit_code(honest, 80) == 0


def test_kernel_whose_scores_overflow_is_outside_by_any_bound() -> None:
    """A score beyond the range of float16 is no number, and so is the result."""
    profile = Profile.default("float32", score_format="float16")
    case = lying(5, profile, {"exp2": False})
    inputs = DecodeCase(dtype="float32", seqlens=(8,), num_heads=4, kv_lora_rank=4, logit_std=1e7)
    overflow = replace(case, inputs=inputs)
    judged = judge_case(overflow)
    assert judged.out.outside > 0
    assert judged.out.worst == np.inf
    assert "outside" in report([judged], 0)


def test_cases_repeat_and_differ() -> None:
    assert draw_case(1, 7) == draw_case(1, 7)
    described = {draw_case(seed, index).describe() for seed in (0, 1) for index in range(40)}
    assert len(described) == 80
    assert {draw_case(0, index).preset for index in range(400)} == set(all_presets())


def test_family_covers_what_profiles_can_say() -> None:
    profiles = [draw_case(0, index).profile for index in range(500)]
    assert (
        {p.score.order for p in profiles}
        == {p.value.order for p in profiles}
        == {"sequential", "blocked", "tensor-core"}
    )
    assert {p.probabilities for p in profiles} == {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn"}
    assert {p.row_sum for p in profiles} == {"rounded", "unrounded", "normalised", "lse"}
    assert {p.tile for p in profiles} >= {None, 16, 256}
    assert {p.splits for p in profiles} >= {1, 64}
    assert any(max(draw_case(0, index).inputs.seqlens) > 2048 for index in range(500))


def test_processes_share_the_cases() -> None:
    one = run_soundness(60, seed=2, first=100)
    two = sorted(run_soundness(60, seed=2, first=100, jobs=2), key=lambda j: j.index)
    assert [replace(j, seconds=0.0) for j in one] == [replace(j, seconds=0.0) for j in two]


def test_interrupted_run_keeps_what_is_done() -> None:
    def interrupt(done: int) -> None:
        if done >= 50:
            raise KeyboardInterrupt

    judged = run_soundness(1000, progress=interrupt)
    assert [j.index for j in judged] == list(range(50))
    assert exit_code(judged, 1000) == 3
    assert report(judged, 0).splitlines()[0].startswith("preset")
    assert report([], 0) == "no case is done"


def test_ratios_take_infinities_and_nan_as_they_are() -> None:
    inf, nan = np.inf, np.nan
    want = np.array([1.0, -inf, -inf, 0.0, 0.0])
    bound = np.array([0.5, 0.0, 0.0, 0.0, 1.0])
    assert Ratios.of(np.array([1.25, -inf, -inf, 0.0, -1.0]), want, bound) == Ratios(1.0, 5, 0)
    assert Ratios.of(np.array([1.25, -inf, 0.0, 1e-9, nan]), want, bound) == Ratios(inf, 5, 3)
    assert Ratios.of(want[:0], want[:0], bound[:0]) == Ratios(0.0, 0, 0)


def test_command_prints_a_table_and_how_to_repeat_the_worst_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soundness", "--cases", "30", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    (row,) = re.findall(r"^all +30 +(\d+) +0 +([\d.]+) .*$", out, re.MULTILINE)
    assert int(row[0]) > 1000
    worst, index = re.search(
        r"bound of out: ([\d.]+)\n.*\n  replay: mla-spec soundness --cases 1 --seed 4 --first (\d+)", out
    ).groups()
    assert worst == row[1]
    assert main(["soundness", "--cases", "1", "--seed", "4", "--first", index]) == 0
    assert f"bound of out: {worst}\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--cases", "--jobs"])
def test_senseless_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soundness", option, "0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
