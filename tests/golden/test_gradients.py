"""Gradients in ball arithmetic: against known ones, and against the reference; and faults that the golden cases catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.running import Bounded
from mla_spec.golden.corpus import compare, computed_gradients
from mla_spec.reference.typing import Array
from tests.golden.corpus_files import require_refusal

pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")

from mla_spec.golden.exact.ball_gradients import gradients
from mla_spec.golden.exact.expected import expected


def agrees(operation: str, inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
    """The reference stays within its own allowance of the certified results."""
    compare.compare(operation, inputs, parameters, expected(operation, inputs, parameters), [])


def test_derivatives_of_known_functions() -> None:
    x, y = np.array([2.0, 3.0]), np.array([5.0])
    for loss, want in (
        (lambda x, y: (x * y).sum(), ([5, 5], [5])),
        (lambda x, y: x[0] * x[1] / y[0], ([3 / 5, 2 / 5], [-6 / 25])),
        (lambda x, y: (x[0] * y[0]).exp() + x[1], ([5 * np.exp(10), 1], [2 * np.exp(10)])),
        (lambda x, y: x[1].log() * 7, ([0, 7 / 3], [0])),
    ):
        for got, exact in zip(gradients(loss, x, y), want, strict=True):
            # one rounding of the middle of a ball; two, and an exp good to an ulp, of what is written here
            np.testing.assert_array_max_ulp(got.astype(float), np.array(exact, dtype=float), maxulp=4)


@pytest.mark.parametrize("seed", range(4))
def test_packed_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"q": (5, 2, 3), "k": (6, 2, 3), "v": (6, 2, 4), "out_grad": (5, 2, 4)}
    inputs: dict[str, Any] = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs |= {"cu_seqlens_q": np.array([0, 2, 2, 5]), "cu_seqlens_k": np.array([0, 3, 4, 6])}
    inputs["lse_grad"] = rng.standard_normal((2, 5))
    agrees("prefill_backward", inputs, {"softmax_scale": 0.5, "causal": seed % 2 == 0})


@pytest.mark.parametrize("seed", range(4))
def test_sparse_attention(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = {
        "q": rng.standard_normal((3, 2, 5)),
        "kv": rng.standard_normal((7, 1, 5)),
        "indices": rng.integers(-1, 8, (3, 1, 4)),
        "out_grad": rng.standard_normal((3, 2, 3)),
        "lse_grad": rng.standard_normal((3, 2)),
        "attn_sink": rng.standard_normal(2),
    }
    agrees("sparse_prefill_backward", inputs, {"softmax_scale": 0.5, "head_dim_v": 3})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("prefill-gradients", {"lse_grad": np.zeros_like}),
        ("prefill-gradients", {"softmax_scale": lambda x: x + 1e-9}),
        ("sparse-prefill-gradients", {"attn_sink": lambda x: None}),
        ("sparse-prefill-gradients", {"indices": lambda x: np.where(x < 0, 5, x)}),
        ("sparse-prefill-gradients", {"indices": lambda x: np.where(x == [[3, 1, 3]], [[3, 1, -1]], x)}),
    ],
)
def test_faults_of_gradients(
    name: str, changes: dict[str, Callable[[Any], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute = "sparse_prefill_backward_with_bound" if name.startswith("sparse") else "prefill_backward_with_bound"
    right = getattr(computed_gradients, attribute)

    def wrong(*arguments: Any, **options: Any) -> Any:
        if name.startswith("sparse"):
            q, kv, indices, out_grad = arguments
            arguments = (q, np.nan_to_num(kv), changes.get("indices", lambda x: x)(indices), out_grad)
        return right(*arguments, **{key: changes.get(key, lambda x: x)(value) for key, value in options.items()})

    require_refusal(monkeypatch, name, computed_gradients, attribute, wrong)


def test_a_value_without_its_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = computed_gradients.sparse_prefill_backward_with_bound

    def keys_only(*arguments: Any, **options: Any) -> tuple[Bounded, Bounded]:
        q_grad, kv_grad = right(*arguments, **options)
        no_values: Array = np.where(np.arange(5) < 3, 0.0, kv_grad.value)
        return q_grad, Bounded(no_values, kv_grad.error)

    require_refusal(
        monkeypatch, "sparse-prefill-gradients", computed_gradients, "sparse_prefill_backward_with_bound", keys_only
    )
