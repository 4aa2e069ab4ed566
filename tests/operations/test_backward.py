"""Cases of gradients, the driver that takes them, and what laws say of subjects without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.gradients import BackwardDriver, PrefillBackwardCase, SparseBackwardCase
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.properties.strategies.gradients import exact_backward_cases, prefill_backward_cases, sparse_backward_cases
from mla_spec.reference.attention import attention
from mla_spec.reference.formats import round_to
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import BACKWARD, DTYPES, Supports
from mla_spec.subjects.violation import Violation

AGREES = "test_prefill_gradients_agree_with_reference"
SPARSE_AGREES = "test_sparse_prefill_gradients_agree_with_reference"
STRATEGIES = (prefill_backward_cases, exact_backward_cases, sparse_backward_cases)
ANY_CASE = st.one_of(strategy(Supports(), Profile.default(dtype)) for dtype in DTYPES for strategy in STRATEGIES)
CASE = PrefillBackwardCase(
    dtype="float32", seed=1, seqlens_q=(2,), seqlens_k=(3,), num_heads=2, qk_head_dim=4, v_head_dim=3
)


@given(ANY_CASE)
@settings(max_examples=100, deadline=None)
def test_the_id_holds_the_whole_case(case: Case) -> None:
    assert parse_case(case.id) == case


@given(st.one_of(strategy(Supports(), Profile.default("float16")) for strategy in STRATEGIES))
@settings(max_examples=60, deadline=None)
def test_inputs_are_reproducible_and_representable(case: PrefillBackwardCase | SparseBackwardCase) -> None:
    first, again = case.with_gradients(), case.with_gradients()
    for a, b in ((first.out_grad, again.out_grad), (first.forward.q, again.forward.q)):
        np.testing.assert_array_equal(a, b)
        assert np.array_equal(round_to(a, "float16"), a)
    assert np.array_equal(round_to(first.lse_grad, "float32"), first.lse_grad)


@given(exact_backward_cases(Supports(), Profile.default("bfloat16", probabilities="float32")))
@settings(max_examples=60, deadline=None)
def test_exact_cases_have_exact_steps(case: PrefillBackwardCase) -> None:
    """Scores are 0, and O, dP, D = 1 and dP − D are numbers of bfloat16."""
    x = case.with_gradients()
    forward = x.forward
    for i in range(len(case.seqlens_q)):
        queries, keys = (slice(*cu[i : i + 2]) for cu in (forward.cu_seqlens_q, forward.cu_seqlens_k))
        q, k, v, do = forward.q[queries], forward.k[keys], forward.v[keys], x.out_grad[queries]
        assert not np.einsum("shd,thd->hst", np.abs(q), np.abs(k)).any()
        out, _ = attention(q, k, v, softmax_scale=1.0, causal=case.causal)
        dp, mean = np.einsum("shd,thd->sht", do, v), (do * out).sum(axis=-1)
        assert (mean == 1).all()
        for step in (out, dp, dp - 1):
            assert np.array_equal(round_to(step, "bfloat16"), step)


def test_products_of_exact_cases_are_not_exact() -> None:
    """In a good part of the cases the sum of the rounded products is not that of the products."""
    wrong = 0
    for seed in range(40):
        case = PrefillBackwardCase(
            dtype="bfloat16", seed=seed, seqlens_q=(1,), seqlens_k=(16,), qk_head_dim=2, v_head_dim=3, regime="exact"
        )
        x = case.with_gradients()
        products = x.forward.v.mean(axis=0) * x.out_grad[0]  # [h, v]
        wrong += round_to(products, "bfloat16").sum() != 1
    assert wrong >= 8


def test_every_other_query_of_a_sparse_case_selects_all_different_rows() -> None:
    case = SparseBackwardCase(
        dtype="float32", seed=3, s_q=4, s_kv=9, topk=6, invalid=0.9, duplicates=True, with_length=True, regime="aligned"
    )
    forward = case.with_gradients().forward
    assert forward.topk_length is not None
    for row, length in zip(forward.entries[::2], forward.topk_length[::2], strict=True):
        assert length == 6
        assert len(set(row.tolist())) == 6
        assert {-1, 1} == set(np.sign(forward.kv[row, 0, 0] * forward.kv[0, 0, 0]).astype(int))  # both kinds


class Changed(TorchExplicit):
    """A subject whose ``prefill`` returns what ``change`` makes of the right answer."""

    def __init__(self, change: Any, **supports: Any) -> None:
        self.change = change
        self.supports = Supports(**{"backward": BACKWARD} | supports)

    def prefill(self, *arguments: Any, **options: Any) -> Any:
        return self.change(*arguments[:3], *super().prefill(*arguments, **options))


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("illegal memory access")


@pytest.mark.parametrize(
    ("change", "verdict", "message"),
    [
        (
            lambda q, k, v, out, lse: (out.detach(), lse),
            "fail",
            "out of prefill does not require grad though q, k, v do: no gradient flows through it; supports.backward must",
        ),
        (
            lambda q, k, v, out, lse: (v[: len(out)].mean(dim=0) + 0 * out.detach(), lse),
            "fail",
            "q got no gradient from the backward pass of prefill",
        ),
        (lambda q, k, v, out, lse: (2 * out, lse), "fail", "gradient of q[1, 1, 0]: got"),
        (lambda q, k, v, out, lse: (Failing.apply(out), lse), "crashed", "RuntimeError: illegal memory access"),
    ],
)
def test_what_a_bad_backward_pass_gets(change: Any, verdict: str, message: str) -> None:
    record = run_law(all_laws()[AGREES], Changed(change), Options(case=CASE))
    assert record.verdict == verdict
    assert message in record.message


class Undeclared(Changed):
    """Never spoke of gradients."""

    def __init__(self, change: Any) -> None:
        super().__init__(change, backward=None)


def refuses(q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
    raise RuntimeError("derivative for my_kernels::prefill is not implemented")


@pytest.mark.parametrize(
    ("change", "verdict", "message"),
    [
        (lambda q, k, v, out, lse: (out.detach(), lse), "unsupported", "out of prefill does not require grad"),
        (refuses, "unsupported", "derivative for my_kernels::prefill is not implemented"),
        (
            lambda q, k, v, out, lse: (out.detach() + torch.zeros_like(out).requires_grad_(), lse),
            "unsupported",
            "none of q, k, v got a gradient",
        ),
        (lambda q, k, v, out, lse: (v[: len(out)].mean(dim=0) + 0 * out.detach(), lse), "fail", "q got no gradient"),
        (lambda q, k, v, out, lse: (2 * out, lse), "fail", "gradient of q[1, 1, 0]: got"),
        (lambda q, k, v, out, lse: (Failing.apply(out), lse), "crashed", "RuntimeError: illegal memory access"),
    ],
)
def test_only_who_has_gradients_or_speaks_of_them_is_judged(change: Any, verdict: str, message: str) -> None:
    record = run_law(all_laws()[AGREES], Undeclared(change), Options(case=CASE))
    assert record.verdict == verdict
    assert message in record.message
    assert run_law(all_laws()[AGREES], Undeclared(change), Options(examples=8, minimise=False)).verdict == verdict


def test_a_file_named_after_gradients_speaks_of_none() -> None:
    """A crash is one wherever the code lies that raises it."""
    namespace: dict[str, Any] = {}
    exec(compile("def raises(*_):\n    raise RuntimeError('illegal memory access')", "gradients.py", "exec"), namespace)
    assert run_law(all_laws()[AGREES], Undeclared(namespace["raises"]), Options(case=CASE)).verdict == "crashed"


def test_an_lse_without_gradient_must_be_declared() -> None:
    law = all_laws()["test_prefill_gradients_through_the_lse"]

    def detached(q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
        return out, lse.detach()

    silent = run_law(law, Changed(detached), Options(case=CASE))
    assert silent.verdict == "fail"
    assert "supports.lse_backward must say so" in silent.message
    declared = run_law(law, Changed(detached, lse_backward=False), Options(case=CASE))
    assert (declared.verdict, declared.message) == ("unsupported", "no gradient comes through the LSE")
    assert run_law(law, TorchSDPA(), Options(case=CASE)).verdict == "unsupported"


def test_operations_without_gradients_are_unsupported() -> None:
    subject = Changed(lambda q, k, v, out, lse: (out, lse), backward=("sparse_prefill",))
    few = Options(examples=4)
    record = run_law(all_laws()[AGREES], subject, few)
    assert (record.verdict, record.message) == ("unsupported", "prefill is not differentiable")
    assert run_law(all_laws()[SPARSE_AGREES], subject, few).verdict == "pass"
    with pytest.raises(ValueError, match="backward has unknown value 'decode'"):
        Supports(backward=("decode",))


def test_gradients_have_the_shape_and_dtype_of_their_tensors() -> None:
    """Autograd itself sees to it for leaves; the driver for whatever else may put a gradient there."""
    driver = BackwardDriver(TorchAbsorbed(), "float32")
    x = CASE.with_gradients()
    tensors = driver.tensors(PREFILL, x.forward) | {"out_grad": driver.tensor(x.out_grad)}
    got = driver.prefill_gradients(x.forward, tensors)
    assert {name: result.value.shape for name, result in got.items()} == {
        "q": (2, 2, 4),
        "k": (3, 2, 4),
        "v": (3, 2, 3),
    }
    assert not any(tensor.requires_grad for tensor in tensors.values())

    class Meddling(TorchAbsorbed):
        def prefill(self, q: Any, *arguments: Any, **options: Any) -> Any:
            q.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
            return super().prefill(q, *arguments, **options)

    with pytest.raises(Violation, match="q got no gradient"):
        BackwardDriver(Meddling(), "float32").prefill_gradients(x.forward, tensors)


def test_autograd_records_nothing_in_other_laws() -> None:
    class Watching(TorchAbsorbed):
        recorded: list[bool] = []

        def prefill(self, *arguments: Any, **options: Any) -> Any:
            self.recorded.append(torch.is_grad_enabled())
            return super().prefill(*arguments, **options)

    x = CASE.with_gradients()
    driver = Driver(Watching(), "float32")
    driver.call(PREFILL, x.forward)
    recording = BackwardDriver.of(driver)
    tensors = recording.tensors(PREFILL, x.forward) | {"out_grad": recording.tensor(x.out_grad)}
    recording.prefill_gradients(x.forward, tensors)
    assert Watching.recorded == [False, True]
