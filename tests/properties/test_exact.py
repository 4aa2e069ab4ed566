"""Attention with one right answer at any length: the patterns, and that their answers are those of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run
from mla_spec.properties.exact import LOSING, PERIOD, QUERY, Answer, Pattern, patterns, rounds, rows_of, value_table
from mla_spec.reference.attention import attention
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.violation import Violation


@pytest.mark.parametrize("seen", [1, 2, 5, 70, 4160, 8193])
def test_keys_with_weight_are_seen_and_as_many_as_a_power_of_two(seen: int) -> None:
    for pattern in patterns(seen + 3, seen, all_places=True):
        count = int(pattern.leads.sum())
        assert count > 0
        assert count & (count - 1) == 0
        assert not pattern.leads[seen:].any()


def test_a_key_leads_at_the_ends_in_the_middle_and_next_to_boundaries() -> None:
    places = {int(np.argmax(p.leads)) for p in patterns(5000, 5000, all_places=True) if p.leads.sum() == 1}
    assert {0, 2500, 4999, 255, 256, 511, 512, 2047, 2048, 4095, 4096} <= places


@pytest.mark.parametrize("turn", range(9))
def test_one_place_is_another_for_other_cases(turn: int) -> None:
    (single,) = (p for p in patterns(5000, 5000, all_places=False, turn=turn) if p.leads.sum() == 1)
    (other,) = (p for p in patterns(5000, 5000, all_places=False, turn=turn + 1) if p.leads.sum() == 1)
    assert np.argmax(single.leads) != np.argmax(other.leads)


def test_one_group_has_three_times_the_keys_of_the_other_in_no_part_alone() -> None:
    """Of parts of 512 keys, none has both groups in that ratio; merged by their maxima they would weigh alike."""
    pattern = patterns(4161, 4161, all_places=False)[-1]
    counts = [int((pattern.leads & (pattern.group == group)).sum()) for group in (0, 1)]
    assert counts == [1024, 3072]
    for start in range(0, 4161, 512):
        part = slice(start, start + 512)
        light, heavy = ((pattern.leads[part] & (pattern.group[part] == g)).sum() for g in (0, 1))
        assert 3 * light != heavy or not light


def test_every_sequence_has_all_of_its_patterns() -> None:
    every = list(rounds((5, 600, 0), (5, 600, 0), seed=0))
    assert len(every) == len(patterns(600, 600, all_places=True))
    assert {each[0].what for each in every} == {p.what for p in patterns(5, 5, all_places=True)}
    assert not any(each[2].leads.any() for each in every)


def test_answers_are_those_of_the_reference() -> None:
    table = value_table(6, seed=3)
    table[..., -1] = 0.0
    rows = rows_of(table, 8, 5)
    place = np.arange(300) % PERIOD
    q = np.zeros((1, 1, 8))
    q[..., 5] = QUERY
    for pattern in patterns(300, 300, all_places=True):
        code = (pattern.leads + 2 * pattern.group) * PERIOD + place
        k = rows[code][:, None]
        out, lse = attention(q, k, k[..., :6], softmax_scale=1.0, causal=False)
        answer = Answer.of(pattern, table, place, Profile.default("float64"))
        np.testing.assert_allclose(answer.out, out[0, 0], rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(np.log(pattern.leads.sum()), lse[0, 0], atol=1e-12)


def a_run(profile: Profile) -> Run:
    subject = TorchAbsorbed()
    return Run(Driver(subject, profile.dtype), profile, subject.supports)


HALF = Pattern("keys 0 .. 127 have equal weight", np.arange(200) < 128, np.zeros(200, dtype=int))


def test_one_wrong_bit_or_a_wrong_lse_is_a_violation() -> None:
    table, place = value_table(4, seed=1), np.arange(200) % PERIOD
    profile = Profile.default("float32")
    answer, run = Answer.of(HALF, table, place, profile), a_run(profile)
    right = answer.out.astype(np.float32).astype(float)[None]
    lse = np.array([np.log(128)])
    answer.judge(run, right, lse)
    assert run.compared == 4
    wrong = right.copy()
    wrong[0, 2] = np.nextafter(np.float32(wrong[0, 2]), np.float32(9))
    with pytest.raises(
        Violation, match=r"out\[0, 2\]: got .*, want exactly .*, since keys 0 \.\. 127 have equal weight; 1 of 4"
    ):
        answer.judge(run, wrong, lse)
    with pytest.raises(Violation, match=r"LSE: got .* want .* within"):
        answer.judge(run, right, np.array([np.log(127)]))
    with pytest.raises(Violation, match="LSE: got"):
        answer.judge(run, right, np.array([np.nan]))
    with pytest.raises(Violation, match="out"):
        answer.judge(run, np.full_like(right, np.nan), lse)


def test_merges_by_lse_may_round() -> None:
    """Where parts are merged, an output may be off by what that rounds, and by no more."""
    table, place = value_table(4, seed=1), np.arange(200) % PERIOD
    profile = Profile.default("float32", splits=4)
    answer, run = Answer.of(HALF, table, place, profile), a_run(profile)
    answer.judge(run, answer.out[None] * (1 + 2.0**-22), None)
    with pytest.raises(Violation, match=r"want [^e]"):
        answer.judge(run, answer.out[None] * (1 + 2.0**-8), None)


def test_losing_keys_have_no_weight_in_any_format() -> None:
    assert np.exp(QUERY * LOSING) == 0.0
