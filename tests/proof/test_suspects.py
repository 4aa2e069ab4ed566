"""Known faults are named where they give the same wrong numbers, and only there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.installed import all_laws, planted_bugs
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.proof.hypotheses import HYPOTHESES
from mla_spec.proof.suspects import named_suspects, room, suspects


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with room() as made:
        yield made


def failure(subject: object, law: str, dtype: str = "float32", seed: int = 0) -> Record:
    record = run_law(all_laws()[law], subject, Options(examples=60, dtypes=(dtype,), seed=seed))
    assert record.verdict == "fail"
    return record


def test_a_planted_bug_is_named_with_its_source(pool: WorkerPool) -> None:
    bug = planted_bugs()["F22"]
    found = named_suspects(failure(bug.make(), "test_decode_agrees_with_reference", seed=2), pool)
    assert [each["id"] for each in found] == ["F22"]
    assert found[0]["source"] == bug.source[0]
    assert found[0]["claim"] == "The page is looked up for every other page only."


def test_a_fault_that_nobody_knows_is_not_named(pool: WorkerPool) -> None:
    class Odd(TorchAbsorbed):
        def decode(self, *arguments: object, **options: object) -> object:
            out, lse = super().decode(*arguments, **options)  # type: ignore[arg-type]
            return out * 1.125 + 0.01, lse

    assert named_suspects(failure(Odd(), "test_decode_agrees_with_reference"), pool) == []


def test_a_convention_is_named_with_what_declares_it(pool: WorkerPool) -> None:
    (hypothesis,) = (each for each in HYPOTHESES if each.id == "empty-rows-of-nan")
    record = failure(hypothesis.make(), "test_decode_agrees_with_reference")
    (found,) = (each for each in named_suspects(record, pool) if each["id"] == hypothesis.id)
    assert found["declare"] == 'Supports(empty_row="unsupported")'


def test_a_bug_may_be_left_out_of_the_suspects(pool: WorkerPool) -> None:
    record = failure(planted_bugs()["F22"].make(), "test_decode_agrees_with_reference", seed=2)
    assert named_suspects(record, pool, without=["F22"]) == []


def test_ids_of_suspects_are_unique_and_each_says_what_it_does() -> None:
    ids = [each.id for each in suspects()]
    assert len(set(ids)) == len(ids)
    assert all(each.claim for each in suspects())
    assert all(each.operations for each in suspects() if each.id in {h.id for h in HYPOTHESES})
