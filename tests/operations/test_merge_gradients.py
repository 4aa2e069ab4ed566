"""Cases of gradients of ``merge`` and ``rope`` and of merged parts, and what laws say of subjects without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchSDPA
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.merge_gradients import MergeBackwardCase, RingCase
from mla_spec.operations.rope_gradients import RopeBackwardCase
from mla_spec.properties.strategies.gradients import merge_backward_cases, ring_cases, rope_backward_cases
from mla_spec.reference.formats import round_to
from mla_spec.reference.merge import merge
from mla_spec.reference.prefill import prefill
from mla_spec.subjects.supports import BACKWARD, DTYPES, Supports

RING = "test_gradients_through_merged_parts_are_those_of_the_whole"
MERGE = "test_merge_gradients_agree_with_reference"
ROPE = "test_rope_gradient_agrees_with_reference"
STRATEGIES = (merge_backward_cases, ring_cases, rope_backward_cases)
CASES = st.one_of(strategy(Supports(), Profile.default(dtype)) for dtype in DTYPES for strategy in STRATEGIES)
RINGS = st.one_of(ring_cases(Supports(), Profile.default(dtype)) for dtype in DTYPES)
FEW = Options(examples=8, minimise=False)


@given(CASES)
@settings(max_examples=60, deadline=None)
def test_the_id_holds_the_whole_case(case: Case) -> None:
    assert parse_case(case.id) == case


@given(st.one_of(strategy(Supports(), Profile.default("float16")) for strategy in STRATEGIES))
@settings(max_examples=60, deadline=None)
def test_inputs_are_reproducible_and_representable(case: MergeBackwardCase | RingCase | RopeBackwardCase) -> None:
    first, again = case.with_gradients(), case.with_gradients()
    np.testing.assert_array_equal(first.out_grad, again.out_grad)
    assert np.array_equal(round_to(first.out_grad, "float16"), first.out_grad)
    if isinstance(case, MergeBackwardCase):
        x = case.with_gradients()
        assert np.array_equal(round_to(x.forward.outs, "float16"), x.forward.outs)
        assert np.array_equal(round_to(x.lse_grad, "float32"), x.lse_grad)


@given(RINGS)
@settings(max_examples=60, deadline=None)
def test_merged_parts_are_the_whole(case: RingCase) -> None:
    """Every key is in one part, and the parts' outputs and LSEs merge to those of all keys."""
    whole = case.with_gradients().forward
    parts = case.key_parts(whole)
    assert len(parts) == case.parts
    assert sorted(np.concatenate([part.keys for part in parts])) == list(range(len(whole.k)))
    assert all(len(part.keys) for part in parts)
    outs, lses = (np.stack(x) for x in zip(*(prefill(**vars(part.forward)) for part in parts), strict=True))
    for got, want in zip(merge(outs, lses), prefill(**vars(whole)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_rings_have_rows_without_keys_in_a_part() -> None:
    """As of the first query, where all keys but those it must not see are in other parts."""
    found = 0
    for seed in range(20):
        case = RingCase(dtype="float32", seed=seed, seqlens_q=(4,), seqlens_k=(6,), qk_head_dim=2, causal=True)
        parts = case.key_parts(case.with_gradients().forward)
        found += any(np.isneginf(prefill(**vars(part.forward))[1]).any() for part in parts)
    assert 0 < found < 20


class Detached(TorchAbsorbed):
    """Takes what does not count for gradients from ``merge``, ``rope`` and the LSE of ``prefill``."""

    def merge(self, *arguments: Any) -> Any:
        return tuple(x.detach() for x in super().merge(*arguments))

    def rope(self, *arguments: Any, **options: Any) -> Any:
        return super().rope(*arguments, **options).detach()


class NoLseGradient(TorchAbsorbed):
    def prefill(self, *arguments: Any, **options: Any) -> Any:
        out, lse = super().prefill(*arguments, **options)
        assert lse is not None
        return out, lse.detach()


@pytest.mark.parametrize(("law", "name"), [(MERGE, "merge"), (ROPE, "rope")])
def test_who_speaks_of_gradients_must_have_them(law: str, name: str) -> None:
    subject: Any = Detached()
    record = run_law(all_laws()[law], subject, FEW)
    assert record.verdict == "fail"
    assert f"out of {name} does not require grad" in record.message
    subject.supports = Supports(backward=None)
    assert run_law(all_laws()[law], subject, FEW).verdict == "unsupported"
    subject.supports = Supports(backward=("prefill",))
    record = run_law(all_laws()[law], subject, FEW)
    assert (record.verdict, record.message) == ("unsupported", f"{name} is not differentiable")


def test_a_ring_needs_the_gradient_of_the_lse() -> None:
    subject: Any = NoLseGradient()
    record = run_law(all_laws()[RING], subject, FEW)
    assert record.verdict == "fail"
    assert "lse of prefill does not require grad" in record.message
    assert "supports.lse_backward must say so" in record.message
    subject.supports = Supports(backward=BACKWARD, lse_backward=False)
    assert run_law(all_laws()[RING], subject, FEW).message == "no gradient comes through the LSE"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lse": False}, "prefill returns no LSE"),
        ({"causal": (True,)}, "attention is causal only"),
        ({"empty_row": "unsupported"}, "no rule for rows without keys"),
        ({"backward": ("merge",)}, "prefill is not differentiable"),
        ({"backward": ("prefill",)}, "merge is not differentiable"),
    ],
)
def test_what_a_ring_needs(changes: dict[str, Any], message: str) -> None:
    subject: Any = TorchAbsorbed()
    subject.supports = replace(TorchAbsorbed.supports, **changes)
    record = run_law(all_laws()[RING], subject, FEW)
    assert (record.verdict, record.message) == ("unsupported", message)


@pytest.mark.parametrize("subject", [TorchAbsorbed(), TorchSDPA()], ids=lambda x: x.name)
def test_rows_without_keys_give_no_nan(subject: Any) -> None:
    """A loss of everything that merge returns, with one row whose parts are all empty."""
    outs, lses = torch.ones(2, 1, 2, 3, requires_grad=True), torch.zeros(2, 2, 1)
    lses[:, 0] = -torch.inf
    lses.requires_grad_()
    out, lse = subject.merge(outs, lses)
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])
    assert outs.grad is not None
    assert lses.grad is not None
    assert outs.grad[:, 0, 0].eq(0).all()
    assert lses.grad[:, 0].eq(0).all()
    assert lses.grad[:, 1].eq(0.5).all()
