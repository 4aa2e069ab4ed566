"""bounds.json: sound, as strict as it can be, the same on every machine, and enough to judge without this package."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.bounds.profile_presets import preset
from mla_spec.golden.cases.all import cases
from mla_spec.golden.cases.case import config_from, layer_weights
from mla_spec.golden.corpus import corpus
from mla_spec.golden.corpus.bounds import CACHED, COMMON, bounds_of, by_row, profiles_of
from mla_spec.golden.corpus.calls import CALLS
from mla_spec.golden.corpus.corpus import CorpusError, StoredCase
from mla_spec.golden.corpus.laws import check_golden
from mla_spec.operations.layer import LayerDriver
from mla_spec.planted_bugs import PLANTED
from mla_spec.subjects.driver import Driver
from tests.golden.corpus_files import stored_case
from tests.golden.test_corpus import read_by_hand

BOUNDS = json.loads((corpus.installed() / "bounds.json").read_text(encoding="utf-8"))
NEW = (
    "rope-table-longrope-short",
    "rope-table-longrope-long",
    "rope-longrope",
    "layer-longrope",
    "layer-mla-scale",
    "layer-llama-4-scaling",
    "layer-at-its-place",
    "layer-moved",
    "prefill-kernel-dims",
    "decode-kernel-dims",
)


def numbers(case: str, array: str, profile: str) -> list[float]:
    found: list[float] = BOUNDS["cases"][case][array][profile]
    return found


def test_every_bounded_answer_of_a_subject_has_its_bounds() -> None:
    for case in cases():
        stored = stored_case(case.name)
        asked = case.operation in (*CALLS, "layer")
        for array, answer in stored.expected.items():
            if not asked or array in stored.exact:
                assert array not in BOUNDS["cases"].get(case.name, {})
                continue
            if (case.operation, array) == ("indexer", "indices"):
                continue  # a choice, not a number
            found = BOUNDS["cases"][case.name][array]
            assert list(found) == profiles_of(case)
            assert {len(rows) for rows in found.values()} == {answer[..., 0].size}
    assert "fp64" in BOUNDS["cases"]["decode-paged"]["out"]
    assert set(BOUNDS["cases"]["decode-kernel-dims"]["lse"]) == set(COMMON)
    assert CACHED in BOUNDS["cases"]["decode-fp8-ds-mla"]["out"]


def test_each_number_is_the_largest_bound_of_its_row_rounded_up() -> None:
    for case in cases():
        for profile in profiles_of(case):
            for array, total in bounds_of(case, preset(profile)):
                if array in case.exact:
                    continue
                largest = total.max(axis=-1, initial=0.0).ravel()
                for number, bound in zip(numbers(case.name, array, profile), largest, strict=True):
                    assert bound <= number <= 1.01 * bound + 1e-300, (case.name, array, profile)
                # Sums in another order change a bound by far less than this.
                for factor in (1 - 1e-11, 1 + 1e-11):
                    assert by_row(total * factor) == numbers(case.name, array, profile), (case.name, array, profile)


def test_rounding_up_keeps_three_digits() -> None:
    assert by_row(np.array([[0.0, 0.0], [1.0001, 0.5], [0.00123456, 0.0], [np.inf, 1.0]])) == [0.0, 1.01, 0.00124, None]


def test_a_changed_number_is_refused(copy: Path) -> None:
    path = copy / "bounds.json"
    changed = json.loads(path.read_text(encoding="utf-8"))
    changed["cases"]["decode-paged"]["out"]["fp64"][2] *= 2
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"bounds\.json: cases\.decode-paged\.out\.fp64\[2\] is "):
        corpus.verify(copy)


# The ten lines of README.md, with nothing of this package


def judged_by_hand(case: dict[str, Any], answers: dict[str, Sequence[float]], profile: str, bounds: Any) -> bool:
    """Whether the answers of a program pass."""
    root = corpus.installed()
    for array in case["arrays"]:
        if array["role"] != "expected" or array["name"] not in answers:
            continue
        want, got = read_by_hand(root, array), answers[array["name"]]
        width = array["shape"][-1]
        for i, (w, g) in enumerate(zip(want, got, strict=True)):
            if array["comparison"] == "exact":
                allowed: float | None = 0.0
            else:
                allowed = bounds["cases"][case["name"]][array["name"]][profile][i // width]
            if allowed is not None and g != w and not abs(g - w) <= allowed:
                return False
            if math.isnan(g):
                return False
    return True


def answers_of(subject: Any, stored: StoredCase, dtype: str) -> dict[str, Sequence[float]]:
    """What a subject computes of a case, as plain numbers."""
    driver = Driver(subject, dtype)
    if stored.operation != "layer":
        operation, build = CALLS[stored.operation]
        inputs = build(stored)
        got = driver.call(operation, inputs)
        return {
            name: part.value.ravel().tolist() for name, part in zip(got.names, got, strict=True) if part is not None
        }
    weights, hidden, at = layer_weights(stored.inputs), stored.inputs["hidden"], stored.inputs["positions"]
    layer = LayerDriver.of(driver, weights, config_from(stored.parameters["config"]))
    prompt = stored.parameters["prompt"]
    first = layer.run("prefill", hidden[:, :prompt], at[:, :prompt]).value
    rest = [layer.run("decode", hidden[:, [i]], at[:, [i]]).value for i in range(prompt, hidden.shape[1])]
    return {"prefill": first.ravel().tolist(), "decode": np.concatenate(rest, axis=1).ravel().tolist()}


MANIFEST = {
    entry["name"]: entry
    for entry in json.loads((corpus.installed() / "manifest.json").read_text(encoding="utf-8"))["cases"]
}
JUDGED = (
    "decode-kernel-dims",
    "decode-bfloat16",
    "prefill-kernel-dims",
    "layer-moved",
    "layer-mla-scale",
    "rope-longrope",
)


@pytest.mark.parametrize("subject", [TorchAbsorbed, TorchExplicit])
@pytest.mark.parametrize(("profile", "dtype"), [("fp64", "float64"), ("fp32", "float32"), ("bf16-flash", "bfloat16")])
@pytest.mark.parametrize("name", JUDGED)
def test_honest_answers_pass_by_the_numbers_alone(name: str, profile: str, dtype: str, subject: type) -> None:
    assert judged_by_hand(MANIFEST[name], answers_of(subject(), stored_case(name), dtype), profile, BOUNDS)


@pytest.mark.parametrize(
    ("bug", "name", "dtype", "profile"),
    [
        ("X70", "layer-mla-scale", "float64", "fp64"),
        ("X70", "layer-mla-scale", "float32", "fp32"),
        ("X73", "rope-longrope", "bfloat16", "bf16-flash"),
        ("G17", "decode-kernel-dims", "bfloat16", "bf16-flash"),
    ],
)
def test_planted_bugs_fail_by_the_numbers_alone(bug: str, name: str, dtype: str, profile: str) -> None:
    answers = answers_of(PLANTED[bug].make(), stored_case(name), dtype)
    assert not judged_by_hand(MANIFEST[name], answers, profile, BOUNDS)


# The new cases


def failing(subject: object) -> set[str]:
    return {r.law.removeprefix("golden:") for r in check_golden(subject) if r.verdict in ("fail", "crashed")}


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        ("X70", "layer-mla-scale"),
        ("X71", "layer-mla-scale"),
        ("X73", "rope-longrope"),
        ("X73", "layer-longrope"),
        ("G17", "decode-kernel-dims"),
    ],
)
def test_what_a_new_case_catches(bug: str, case: str) -> None:
    assert case in failing(PLANTED[bug].make())


class Wraps(TorchAbsorbed):
    """Positions are kept in 16 bits."""

    def angles(self, positions: Any, rope: Any, dtype: Any) -> Any:
        return super().angles(positions % 2**16, rope, dtype)


class Drops(TorchAbsorbed):
    """No temperature by position."""

    def layer(self, weights: Any, config: Any) -> Any:
        return super().layer(weights, replace(config, llama_4_scaling=None))


def test_positions_beyond_16_bits_and_a_temperature_that_is_left_out() -> None:
    assert {"layer-moved"} <= failing(Wraps())
    assert "layer-at-its-place" not in failing(Wraps())
    assert failing(Drops()) == {"layer-llama-4-scaling"}


def test_the_pair_has_the_same_numbers_and_the_same_answers() -> None:
    near, moved = stored_case("layer-at-its-place"), stored_case("layer-moved")
    for name, values in near.inputs.items():
        shift = 2**16 - 3 if name == "positions" else 0
        np.testing.assert_array_equal(moved.inputs[name], values + shift)
    for name, answer in near.expected.items():
        np.testing.assert_array_equal(moved.expected[name], answer)


def test_new_cases_are_in_the_corpus_and_run_in_every_dtype_that_they_may() -> None:
    assert set(NEW) <= {case.name for case in cases()}
    for name in NEW:
        stored = stored_case(name)
        if stored.operation in (*CALLS, "layer"):
            assert set(BOUNDS["cases"][name][next(iter(stored.expected))]) == set(COMMON)
