"""Production loads: what is sampled, what escapes, how loads grow, and which faults are seen."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options, Production, Run
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.properties.load import ROWS, Took, corners, escapes, sample, spread
from mla_spec.properties.loads import DECODE, LOADS, PREFILL, RUNGS
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import Supports

UNDER_LOAD = [name for name in all_laws() if name.endswith("_under_load")]
AGREES, EXACT, ORDER = (f"test_decode_{what}_under_load" for what in ("agrees", "is_exact", "in_any_order"))
SMALL = Options(production=Production(budget=0.5), dtypes=("bfloat16",))
ONE = DecodeCase(
    dtype="float32", seqlens=(3, 5), num_heads=128, kv_lora_rank=6, qk_rope_head_dim=2, page_size=4, shared_pages=0
)


def asked(*cases: DecodeCase, budget: float = 60.0, seed: int = 0, dtype: str = "float32") -> Options:
    """Options with a workload of these cases."""
    return Options(production=Production(budget=budget, seed=seed, workload=cases), dtypes=(dtype,))


class Faulty(TorchAbsorbed):
    """A correct subject whose output of decode ``spoil`` changes in place."""

    def __init__(self, spoil: Callable[[Tensor], None]) -> None:
        self.spoil = spoil

    def decode(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(*arguments, **keywords)
        self.spoil(out)
        return out, lse


def one_head(head: int) -> Callable[[Tensor], None]:
    """All rows of one head are wrong by a tenth."""

    def spoil(out: Tensor) -> None:
        out[:, :, head] *= 1.1

    return spoil


# The sample


@pytest.mark.parametrize("sizes", [(5,), (4, 6), (3, 5, 2), (2, 8, 4), (6, 1, 9), (4, 4, 4)])
def test_places_are_all_different_and_spread(sizes: tuple[int, ...]) -> None:
    every = [spread(i, sizes) for i in range(math.prod(sizes))]
    assert len(set(every)) == len(every)
    assert all(0 <= place < n for row in every for place, n in zip(row, sizes, strict=True))
    for count in range(1, len(every) + 1):
        for axis, n in enumerate(sizes):
            assert len({row[axis] for row in every[:count]}) == min(count, n)


def test_a_row_a_head_and_a_sequence_escape_as_often_as_stated() -> None:
    """Over many seeds, of a batch of 96 with 128 heads and 2 queries."""
    sizes, count = (96, 128, 2), 2000
    fixed = (17, 100, 1)
    hits = np.zeros(4)
    for seed in range(count):
        rows = sample(sizes, seed)
        assert len(set(rows)) == ROWS
        hits += [any(row[axis] == fixed[axis] for row in rows) for axis in range(3)] + [fixed in rows]
    stated = np.array([escapes(n, math.prod(sizes)) for n in sizes] + [1 - ROWS / math.prod(sizes)])
    deviation = np.sqrt(stated * (1 - stated) / count)
    assert np.all(np.abs(1 - hits / count - stated) <= 5 * deviation)
    assert list(stated[:3]) == [1 - 64 / 96, 0.5, 0.0]


def test_corners_are_ends_of_every_axis_and_of_the_lengths() -> None:
    assert corners((4, 3, 1), [5, 9, 2, 5]) == [(i, h, 0) for i in range(4) for h in (0, 2)]
    assert corners((5, 1, 2), [3, 3, 3, 3, 3]) == [(0, 0, 0), (0, 0, 1), (4, 0, 0), (4, 0, 1)]


def test_a_fault_in_one_head_of_128_is_caught_as_often_as_the_report_states() -> None:
    """The law itself, over many seeds; the head is none at a corner."""
    count, caught, stated = 200, 0, set()
    for seed in range(count):
        record = run_law(all_laws()[AGREES], Faulty(one_head(37)), asked(ONE, seed=seed))
        assert record.verdict in ("pass", "fail"), record.text()
        caught += record.verdict == "fail"
        stated |= set(re.findall(r"one head of 128 with ([\d.]+)", record.note))
    (probability,) = map(float, stated)
    assert probability == 0.5
    assert abs(1 - caught / count - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)


def test_a_fault_at_a_corner_is_always_caught() -> None:
    for head in (0, 127):
        for seed in range(5):
            record = run_law(all_laws()[AGREES], Faulty(one_head(head)), asked(ONE, seed=seed))
            assert record.verdict == "fail"
            assert f"head {head}, query 0 (" in record.message


def test_planted_inputs_see_every_head_whatever_is_sampled() -> None:
    for head in (1, 37, 90):
        record = run_law(all_laws()[EXACT], Faulty(one_head(head)), asked(ONE))
        assert record.verdict == "fail"
        assert record.note == ""


# One row


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.operation.name)
@pytest.mark.parametrize("causal", [True, False])
def test_one_row_alone_has_the_value_that_it_has_among_all(load: Any, causal: bool) -> None:
    profile, supports = Profile.default("float64"), Supports(causal=(causal,))
    case = load.ladders(supports, profile, 3)[1][0]
    inputs = load.operation.build(case)
    whole = load.operation.expected(inputs, profile, supports)
    for row in load.rows(case, 7):
        for one, every, place in zip(
            load.operation.expected(load.one(inputs, row), profile, supports), whole, load.places(row), strict=True
        ):
            assert (np.abs(one.value - every.value[place]) <= one.bound.total + every.bound.total[place]).all()


# How loads grow


def test_the_last_rung_is_a_real_load_and_memory_stays_small() -> None:
    assert RUNGS[-1] == (128, 8192)
    for load in LOADS:
        for ladder in load.ladders(Supports(), Profile.default("bfloat16"), 1):
            works = [load.work(case) for case in ladder]
            assert works == sorted(works)
            assert all(load.fits(case, Supports()) for case in ladder)
    case = DECODE.ladders(Supports(), Profile.default("bfloat16"), 1)[0][-1]
    assert (len(case.seqlens), case.num_heads, max(case.seqlens)) == (128, 128, 8192)
    inputs = case.build()
    assert inputs.q.nbytes + inputs.kv_cache.nbytes < 2**28
    assert len(np.unique(inputs.block_table[np.argmax(case.seqlens), :128])) == 128


def test_calls_grow_with_the_work_and_the_rest_with_its_root() -> None:
    took = Took(calls=0.5, all=2.0)
    assert took.promised(16.0) == 0.5 * 16 + 1.5 * 4


def grown(budget: float, seconds_per_work: float, monkeypatch: pytest.MonkeyPatch) -> tuple[list[DecodeCase], str]:
    """The cases of a subject that takes so long, on a clock that only they move."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run = Run(
        Driver(TorchAbsorbed(), "bfloat16"),
        Profile.default("bfloat16"),
        Supports(),
        production=Production(budget=budget),
    )
    cases = []
    for case in DECODE.grown(run):
        assert isinstance(case, DecodeCase)
        cases.append(case)
        clock[0] += seconds_per_work * DECODE.work(case)
        run.seconds = clock[0]
        run.note = DECODE.describe(case)
    return cases, run.note


def test_loads_grow_as_long_as_they_promise_to_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    everything, note = grown(1e9, 1e-9, monkeypatch)
    assert re.match(
        r"128 sequences × (128 heads × 1 query|64 heads × 2 queries) over [12] to 8192 keys in bfloat16: ", note
    )
    assert "too few" not in note
    assert [case.num_heads for case in everything if len(case.seqlens) == 128] == [128, 64, 32, 24]
    some, note = grown(2.0, 1e-8, monkeypatch)
    assert sum(map(DECODE.work, some)) * 1e-8 <= 2.0
    assert {case.num_heads for case in some} == {128, 64, 32, 24}
    assert re.search(r"; 2 s were too few for \d+ larger loads$", note)
    least, _ = grown(1e-9, 1.0, monkeypatch)
    assert [(len(case.seqlens), case.num_heads) for case in least] == [(2, 128)]


def test_the_same_seed_gives_the_same_cases() -> None:
    first, again, other = (
        [case for ladder in DECODE.ladders(Supports(), Profile.default("float16"), seed) for case in ladder]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first[2].seqlens != other[2].seqlens


def test_widths_and_heads_are_those_that_a_subject_takes() -> None:
    some = Supports(
        num_heads=(16,), latent_dims=((256, 32), (8, 4)), page_sizes=(32,), max_s=1, prefill_dims=((24, 16),)
    )
    for load in LOADS:
        for case in load.ladders(some, Profile.default("float32"), 1)[0][:2]:
            assert case.num_heads == 16
            assert load.fits(case, some)
    case = DECODE.ladders(some, Profile.default("float32"), 1)[0][0]
    assert (case.kv_lora_rank, case.qk_rope_head_dim, case.page_size, case.s) == (256, 32, 32, 1)


# The laws


def test_laws_run_only_where_they_are_asked_for() -> None:
    assert len(UNDER_LOAD) == 2 * len(LOADS) + 1
    for name in UNDER_LOAD:
        record = run_law(all_laws()[name], TorchAbsorbed(), Options())
        assert (record.verdict, record.message) == ("unsupported", "not asked for: --production")


@pytest.mark.parametrize("subject", [TorchAbsorbed, TorchExplicit, TorchSDPA])
@pytest.mark.parametrize("name", UNDER_LOAD)
def test_shipped_subjects_conform_at_a_small_budget(name: str, subject: type) -> None:
    record = run_law(all_laws()[name], subject(), SMALL)
    assert record.verdict == "pass", record.text()
    assert record.cases >= 1
    assert ("probability that a fault escapes" in record.note) == name.endswith("_agrees_under_load")


def test_a_budget_is_shared_by_dtypes() -> None:
    budgets = set()

    def look(run: Run, case: Any) -> None:
        budgets.add(run.production.budget)

    run_law(replace(all_laws()[AGREES], check=look), TorchAbsorbed(), replace(asked(ONE, budget=8.0), dtypes=None))
    assert budgets == {2.0}


class Order(TorchExplicit):
    """One sequence after the other; what it returns depends on the place in the batch, by ``size``."""

    size = 0.0

    def decode(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(*arguments, **keywords)
        place = torch.arange(len(out), dtype=out.dtype)[:, None, None, None]
        return out * (1 + self.size * place), lse


def order(size: float, *, invariant: bool) -> Record:
    subject = Order()
    subject.size = size
    subject.profile = {"float32": replace(Order.profile["float32"], batch_invariant=invariant)}
    case = replace(ONE, seqlens=tuple(range(20, 36)), num_heads=4)
    return run_law(all_laws()[ORDER], subject, asked(case))


def test_bits_stay_where_a_profile_promises_it_and_bounds_else() -> None:
    assert order(0.0, invariant=True).verdict == "pass"
    assert order(2.0**-23, invariant=True).verdict == "fail"
    assert order(2.0**-23, invariant=False).verdict == "pass"
    record = order(1e-2, invariant=False)
    assert record.verdict == "fail"
    assert "of 64 rows, " in record.note
    assert "are compared between orders of the batch, all between names of pages" in record.note


class PageBound(TorchAbsorbed):
    """A result has another bit where the first page of a sequence is the last of the pool."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, *arguments: Any, **keywords: Any) -> Any:
        out, lse = super().decode(q, kv_cache, block_table, *arguments, **keywords)
        high = (block_table[:, 0] * 2 >= len(kv_cache)).to(out.dtype)[:, None, None, None]
        return out * (1 + high * 2.0**-23), lse


def test_renamed_pages_change_no_bit_of_any_row() -> None:
    case = replace(ONE, seqlens=tuple(range(20, 36)), num_heads=4)
    record = run_law(all_laws()[ORDER], PageBound(), asked(case))
    assert record.verdict == "fail"
    assert "the pages of the pool were renamed" in record.message


class Hungry(TorchExplicit):
    """Takes memory as if there were no end, from so many sequences on."""

    most = 4

    def decode(self, q: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        if len(q) >= self.most:
            q.new_empty(2**52)
        return super().decode(q, *arguments, **keywords)


@pytest.mark.parametrize("name", [AGREES, EXACT, ORDER])
def test_loads_grow_no_further_than_memory_allows(name: str) -> None:
    seen: list[Any] = []
    options = Options(production=Production(budget=30.0), dtypes=("float32",), announce=seen.append)
    record = run_law(all_laws()[name], Hungry(), options)
    assert record.verdict == "pass", record.text()
    assert {len(case.seqlens) for case in seen if len(case.seqlens) < 4} == {2}
    assert len([case for case in seen if len(case.seqlens) >= 4]) == 4  # once with each number of heads
    assert name == EXACT or record.note.endswith("; memory was too small for one")


def test_what_never_fits_into_memory_is_no_pass() -> None:
    class Always(Hungry):
        most = 1

    record = run_law(all_laws()[AGREES], Always(), SMALL)
    assert record.verdict == "incomplete"
    assert "it did not fit into the memory there is" in record.message
    record = run_law(all_laws()[AGREES], Hungry(), asked(ONE, replace(ONE, seqlens=(3, 4, 5, 6))))
    assert record.verdict == "incomplete"
    assert record.message == "case 2 of 2 of the workload is too large for the memory there is"


def test_another_crash_is_one() -> None:
    class Crashes(TorchExplicit):
        def decode(self, *arguments: Any, **keywords: Any) -> Any:
            raise RuntimeError("illegal memory access")

    assert run_law(all_laws()[AGREES], Crashes(), SMALL).verdict == "crashed"


# Recorded shapes


def test_a_workload_replaces_the_loads_of_its_operations() -> None:
    seen: list[Any] = []
    options = replace(asked(ONE, replace(ONE, s=2)), announce=seen.append)
    assert run_law(all_laws()[AGREES], TorchAbsorbed(), options).verdict == "pass"
    assert [(case.seqlens, case.s, case.dtype) for case in seen] == [((3, 5), 1, "float32"), ((3, 5), 2, "float32")]
    record = run_law(all_laws()["test_prefill_agrees_under_load"], TorchAbsorbed(), options)
    assert (record.verdict, record.message) == ("unsupported", "no case fits what the subject supports")


def test_what_a_subject_does_not_take_is_counted() -> None:
    class Narrow(TorchAbsorbed):
        supports = Supports(num_heads=(128,), max_s=1)

    record = run_law(all_laws()[AGREES], Narrow(), asked(ONE, replace(ONE, s=2), replace(ONE, num_heads=4)))
    assert record.verdict == "pass"
    assert record.cases == 1
    assert record.note.endswith("; 2 of 3 cases are not what the subject supports")


def test_a_workload_that_takes_too_long_is_incomplete() -> None:
    record = run_law(all_laws()[AGREES], TorchAbsorbed(), asked(ONE, ONE, ONE, budget=1e-6))
    assert record.verdict == "incomplete"
    assert record.message == "1 of 3 cases of the workload ran: 1e-06 s were over"


def test_sequences_without_keys_are_judged() -> None:
    case = replace(ONE, seqlens=(0, 5, 2), s=3)
    for name in (AGREES, EXACT, ORDER):
        assert run_law(all_laws()[name], TorchExplicit(), asked(case)).verdict == "pass"
    empty = PrefillCase(
        dtype="float32", seqlens_q=(0, 3, 2), seqlens_k=(4, 0, 5), num_heads=2, qk_head_dim=6, v_head_dim=4
    )
    assert PREFILL.keys(empty) == [0, 0, 0, 4, 5]
    options = Options(production=Production(workload=(empty,)), dtypes=("float32",))
    for name in ("test_prefill_agrees_under_load", "test_prefill_is_exact_under_load"):
        assert run_law(all_laws()[name], TorchExplicit(), options).verdict == "pass"
