"""The float64 reference is certified, and a reference that is worse is not."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest

from mla_spec.front.cli import main
from mla_spec.reference.formats import FORMATS, decode_bits, round_to
from mla_spec.reference.typing import Array

pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")

from mla_spec.golden.exact import certify
from mla_spec.golden.exact import rationals as exact
from mla_spec.golden.exact.certification import certification, tasks
from mla_spec.golden.exact.expected import ENCLOSURES
from mla_spec.golden.exact.gauge import Gauged, attend

# Certification


def test_the_reference_is_within_its_limit_in_every_operation() -> None:
    summaries = certification(65, seed=1)
    assert {s.operation for s in summaries} == set(certify._RESULTS) <= set(ENCLOSURES)
    assert all(s.certified for s in summaries), [(s.operation, s.ulps, s.worst) for s in summaries if not s.certified]
    assert sum(s.cases for s in summaries) == 65


def test_cases_are_the_same_for_the_same_seed() -> None:
    def texts(seed: int) -> list[str]:
        return [task.text for task in tasks(26, seed)]

    assert texts(3) == texts(3) != texts(4)
    assert any("kv_lora_rank=512,qk_rope_head_dim=64" in text for text in texts(3))


def float32_product(a: Array, b: Array, *, prefixes: bool = False) -> Array:
    return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float64)


def moved(ulps: int) -> Any:
    """paged_decode with its first element moved by so many ulps of it."""
    right = certify.paged_decode

    def decode(**x: Any) -> Any:
        out, lse = right(**x)
        out.flat[0] += ulps * np.spacing(out.flat[0])
        return out, lse

    return decode


def test_a_worse_reference_is_not_certified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["golden", "certify", "--cases", "1"]  # of decode
    assert main(command) == 0
    assert "the float64 reference is within 4 ulps, at most " in capsys.readouterr().out
    for target, name, wrong in (
        (certify, "paged_decode", moved(64)),
        (certify, "paged_decode", lambda **x: [np.full_like(y, np.nan) for y in _decode(**x)]),
        ("mla_spec.reference.attention", "accurate_product", float32_product),
    ):
        with monkeypatch.context() as patch:
            path = target if isinstance(target, str) else target.__name__
            patch.setattr(f"{path}.{name}", wrong)
            assert main(command) == 1, wrong
            assert "the float64 reference exceeds 4 ulps, at most " in capsys.readouterr().out


_decode = certify.paged_decode


@pytest.mark.parametrize("number", range(13))
def test_errors_beyond_the_limit_are_found_in_each_kind_of_case(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = [task for i, task in enumerate(tasks(13, 5)) if i == number]
    right = certify._RESULTS[task.operation]

    def wrong(*arguments: Any) -> Any:
        for name, result in right(*arguments):
            yield name, Gauged(result.value + 5 * np.spacing(result.gauge), result.gauge)

    assert max(result.ulps for result in certify.certify(task.operation, task.inputs, task.parameters)) <= 4
    monkeypatch.setitem(certify._RESULTS, task.operation, wrong)
    assert max(result.ulps for result in certify.certify(task.operation, task.inputs, task.parameters)) > 4


@pytest.mark.parametrize(
    ("option", "coarse"),
    [
        *((f"output_gate={kind}", "mla_spec.reference.mla.gate") for kind in ("head", "element", "query")),
        ("attention_sink=true", "mla_spec.reference.attention.sink_share"),
    ],
)
def test_a_gate_or_a_sink_in_float32_is_not_certified(
    option: str, coarse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = next(task for task in tasks(200, 5) if task.operation == "layer" and f",{option}," in task.text)

    def worst() -> float:
        return max(result.ulps for result in certify.certify(task.operation, task.inputs, task.parameters))

    assert worst() <= certify.LIMIT_ULPS
    right = resolve_name(coarse)
    monkeypatch.setattr(coarse, lambda *arguments: right(*arguments).astype(np.float32).astype(np.float64))
    assert worst() > certify.LIMIT_ULPS


def test_certifying_without_flint_names_the_extra() -> None:
    without = (
        "import sys; sys.modules['flint'] = None; from mla_spec.front.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", without, "golden", "certify"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    text = "certifying needs python-flint, which is not installed: pip install 'mla-spec[golden]'"
    assert done.stderr == f"mla-spec: {text}\n"
    assert main(["golden", "certify", "--cases", "0"]) == 2


# The gauge


def test_the_gauge_of_attention_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 1, 3)), rng.standard_normal((4, 1, 3)), rng.standard_normal((4, 1, 2))
    out, lse = attend(*(Gauged.of(x) for x in (q, k, v)), softmax_scale=0.5)
    score, gauge = 0.5 * k[:, 0] @ q[0, 0], 0.5 * np.abs(k[:, 0]) @ np.abs(q[0, 0])  # [t]
    p = np.exp(score) / np.exp(score).sum()
    want = p @ np.abs(v[:, 0]) + (p * (1 + gauge)) @ np.abs(v[:, 0] - p @ v[:, 0])
    np.testing.assert_array_almost_equal_nulp(out.gauge[0, 0], want, nulp=16)
    np.testing.assert_array_almost_equal_nulp(
        lse.gauge[0, 0], abs(np.log(np.exp(score).sum())) + 1 + p @ gauge, nulp=16
    )


def test_rows_without_keys_and_keys_without_weight_have_no_gauge() -> None:
    q, k, v = np.ones((2, 1, 1)), np.array([[[1.0]]]), np.array([[[3.0]]])
    out, lse = attend(*(Gauged.of(x) for x in (q, k, v)), softmax_scale=1.0)
    np.testing.assert_array_equal(out.gauge.ravel(), [0.0, 3.0])
    np.testing.assert_array_equal(lse.gauge.ravel(), [0.0, 1.0 + 1.0 + 1.0])
    k, v = np.array([[[1000.0]], [[-1e300]]]), np.array([[[3.0]], [[-4.0]]])
    out, _ = attend(*(Gauged.of(x) for x in (q, k, v)), softmax_scale=1.0, causal=False)
    np.testing.assert_array_equal(out.gauge.ravel(), [3.0, 3.0])


def test_no_gauge_is_smaller_than_its_value() -> None:
    for task in tasks(36, 2):
        for name, result in certify._RESULTS[task.operation](task.inputs, task.parameters):
            finite = np.isfinite(result.value)
            slack = 16 * np.spacing(np.abs(result.value[finite]))
            assert (result.gauge[finite] + slack >= np.abs(result.value[finite])).all(), (task.text, name)


# Rational arithmetic, against the formats of the reference


@pytest.mark.parametrize("name", [name for name in exact.FIELDS if name != "float32"])
def test_every_pattern_stands_for_the_same_number(name: str) -> None:
    patterns = np.arange(2 ** FORMATS[name].bits)
    values = decode_bits(patterns, name)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(exact.decode_bits(patterns[finite], name), values[finite])
    assert all(exact.number(int(p), name) is None for p in patterns[~finite])
    assert [exact.pattern_of(float(v), name) for v in values[finite]] == patterns[finite].tolist()


@pytest.mark.parametrize("name", [name for name in exact.FIELDS if name != "float32"])
def test_rounding_agrees_wherever_it_is_hard(name: str) -> None:
    rng = np.random.default_rng(0)
    numbers = exact.positive_numbers(name)
    places = rng.integers(0, len(numbers) - 1, 50)
    middles = np.array([float((numbers[i] + numbers[i + 1]) / 2) for i in places])
    x = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf), [0.0, 1e300]])
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(exact.round_to(x, name, "saturate"), round_to(x, name, overflow="saturate"))


def test_patterns_of_float32_and_of_bare_exponents() -> None:
    assert exact.number(0x3F800001, "float32") == 1 + Fraction(1, 2**23)
    assert exact.pattern_of(-1.5, "float32") == 0xBFC00000
    assert exact.pattern_of(0.25, "float8_e8m0fnu") == 125
    assert exact.number(125, "float8_e8m0fnu") == Fraction(1, 4)
    assert exact.number(255, "float8_e8m0fnu") is None
