"""Cases whose softmax_scale is negative: what they hold, that every run has some, and that a subject may decline them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.gradients import PrefillBackwardCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.proof.sensitivity import draw_cases
from mla_spec.subjects.supports import Supports

CASES: list[Any] = [
    DecodeCase(dtype="float32", seqlens=(9, 4), kv_lora_rank=6, qk_rope_head_dim=4, logit_std=4.0),
    PrefillCase(dtype="float32", seqlens_q=(3,), seqlens_k=(5,), qk_head_dim=6),
    PrefillBackwardCase(dtype="float32", seqlens_q=(3,), seqlens_k=(5,), qk_head_dim=6),
    RaggedDecodeCase(dtype="float32", seqlens_q=(3, 1), seqlens_k=(5, 4), kv_lora_rank=6, qk_rope_head_dim=4),
    SparsePrefillCase(dtype="float32", s_q=2, s_kv=8, topk=4, kv_lora_rank=6),
    SparseDecodeCase(dtype="float32", pages=2, page_size=4, topk=4, kv_lora_rank=6),
]
LAWS = (
    "test_decode_agrees_with_reference",
    "test_prefill_agrees_with_reference",
    "test_ragged_decode_agrees_with_reference",
    "test_sparse_prefill_agrees_with_reference",
    "test_sparse_decode_agrees_with_reference",
    "test_quantised_decode_agrees_with_reference",
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_only_the_sign_of_the_scale_differs_from_the_typical_case(case: Any) -> None:
    typical, negative = case.build(), replace(case, regime="negative").build()
    assert negative.softmax_scale == -typical.softmax_scale < 0
    for name, value in vars(typical).items():
        if name != "softmax_scale":
            np.testing.assert_array_equal(getattr(negative, name), value)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_run_has_some_and_a_subject_may_decline_them(law: str, dtype: str) -> None:
    profile, made = Profile.default(dtype), all_laws()[law]
    every, fewer = (draw_cases(made, s, profile, 25, 0) for s in (Supports(), Supports(negative_scale=False)))
    assert any(case.regime == "negative" for case in every)  # type: ignore[attr-defined]
    assert not any(case.regime == "negative" for case in fewer)  # type: ignore[attr-defined]


class TurnsTheScale(TorchAbsorbed):
    """As ``X-root-of-the-scale-on-both-operands``, and says so."""

    supports = Supports(negative_scale=False)

    def scores(self, q: Any, k: Any, softmax_scale: float) -> Any:
        return super().scores(q, k, abs(softmax_scale))


def test_who_takes_no_negative_scale_and_says_so_conforms() -> None:
    assert TurnsTheScale.supports.restrictions() == "negative_scale=False"
    record = run_law(all_laws()[LAWS[0]], TurnsTheScale(), Options(examples=60))
    assert record.verdict == "pass", record.text()
