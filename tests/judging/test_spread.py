"""Counts of elements by how large their errors are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.spread import added, counted
from mla_spec.operations.decode import DecodeCase


def test_ratios_are_counted_in_powers_of_two() -> None:
    ratio = np.array([0.0, 1.0, 0.75, 0.5, 0.3, 2.0**-40, 0.25, 0.0])
    assert counted("bound", ratio) == {"-1": 2, "-2": 2, "-3": 1, "-20": 1, "exact": 2}
    assert counted("bound", np.array([0.5])) == {"-2": 1}
    assert counted("bound", np.array([])) == {}


def test_what_is_further_off_than_is_drawn_is_counted_with_the_last() -> None:
    assert counted("predicted", np.array([1.5, 3.0, 9.0, 1e6, math.nan])) == {"0": 1, "1": 1, "3": 2}


def test_counts_are_added_kind_by_kind() -> None:
    assert added([{"bound": {"-1": 2}}, {}, {"bound": {"-1": 1, "exact": 4}, "predicted": {"0": 1}}]) == {
        "bound": {"-1": 3, "exact": 4},
        "predicted": {"0": 1},
    }


def test_a_law_that_holds_counts_every_element_that_it_judged() -> None:
    case = DecodeCase(dtype="bfloat16", seqlens=(5, 7), num_heads=2, kv_lora_rank=4, page_size=4)
    law = all_laws()["test_decode_agrees_with_reference"]
    record = run_law(law, TorchAbsorbed(), Options(case=case))
    elements = 2 * 2 * 4
    assert record.verdict == "pass"
    assert sum(record.spread["bound"].values()) in (elements, 2 * elements)  # out, twice where the case runs twice
    assert record.as_dict()["spread"] == record.spread


def test_a_law_that_fails_counts_none() -> None:
    class Half(TorchAbsorbed):
        def decode(self, *arguments: object, **options: object) -> object:
            out, lse = super().decode(*arguments, **options)  # type: ignore[arg-type]
            return out / 2, lse

    law = all_laws()["test_decode_agrees_with_reference"]
    assert run_law(law, Half(), Options(examples=4, dtypes=("float32",))).spread == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_deviation_of_a_decode_is_at_most_what_is_predicted(dtype: str) -> None:
    law = all_laws()["test_decode_error_is_as_small_as_declared"]
    record = run_law(law, TorchAbsorbed(), Options(dtypes=(dtype,)))
    counts = record.spread["predicted"]
    least = sum(count * 4.0 ** int(power) for power, count in counts.items() if power != "exact") / sum(counts.values())
    assert record.verdict == "pass"
    assert least <= 1
    assert (len(counts) > 4) == (dtype == "float32"), "most results in bfloat16 are the exact ones, rounded"
