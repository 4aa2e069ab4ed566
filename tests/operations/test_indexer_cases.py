"""Cases of the indexer inside a layer and before sparse attention, and what their laws accept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.indexer import IndexedAttentionCase
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.properties.strategies.indexer import indexed_attention_cases
from mla_spec.properties.strategies.project_indexer import project_indexer_cases
from mla_spec.reference.formats import round_to
from mla_spec.reference.indexer import check_indexer_weights
from mla_spec.subjects.supports import DTYPES, Supports

LAWS = all_laws()
SCORELESS = ("does_not_modify_its_inputs", "output_is_not_aliased", "gives_the_same_bits_again")
OPERANDS = [name for name, law in LAWS.items() if law.needs[0] == "project_indexer" and not name.endswith(SCORELESS)]
TOGETHER = [name for name, law in LAWS.items() if law.needs == ("indexer", "sparse_prefill")]
ANY_CASE = st.one_of(
    strategy(Supports(), Profile.default(dtype))
    for dtype in DTYPES
    for strategy in (project_indexer_cases, indexed_attention_cases)
)


@given(ANY_CASE)
@settings(max_examples=100, deadline=None)
def test_the_id_holds_the_whole_case(case: Case) -> None:
    assert parse_case(case.id) == case


@given(project_indexer_cases(Supports(), Profile.default("float16")))
@settings(max_examples=50, deadline=None)
def test_inputs_are_representable_and_fit_their_configuration(case: ProjectIndexerCase) -> None:
    inputs = case.build()
    check_indexer_weights(inputs.weights, inputs.config)
    for x in (inputs.hidden, inputs.q_latent, *inputs.weights.values()):
        np.testing.assert_array_equal(round_to(x, "float16"), x)
    assert len(inputs.hidden) == len(inputs.q_latent) == len(inputs.positions) == sum(case.seqlens)
    assert inputs.positions[0] == case.start
    assert (inputs.config.rope is None) == (case.rope_dim == 0)


def test_supports_narrows_what_is_drawn() -> None:
    supports = Supports(
        indexer_dims=((4, 128),),
        indexer_top_k=(48, 64, 2048),
        topk_multiple=64,
        indexer_rope_layouts=("half",),
        indexer_rope_optional=False,
        indexer_norm_eps=1e-5,
        yarn=False,
        longrope=False,
    )
    profile = Profile.default("float32")

    @given(
        project_indexer_cases(supports, profile, rotated=True),
        indexed_attention_cases(supports, profile),
        indexed_attention_cases(supports, profile, select_all=True),
    )
    @settings(max_examples=50, deadline=None)
    def drawn(operands: ProjectIndexerCase, some: IndexedAttentionCase, every: IndexedAttentionCase) -> None:
        assert (operands.index_n_heads, operands.index_head_dim) == (4, 128)
        assert (operands.layout, operands.yarn, operands.longrope) == ("half", "none", "none")
        assert 0 < operands.rope_dim < 128
        assert operands.k_norm_eps == 1e-5
        assert {some.top_k, every.top_k} <= {64, 2048}

    drawn()
    with pytest.raises(ValueError, match="indexer_rope_layouts has unknown value 'thirds'"):
        Supports(indexer_rope_layouts=("thirds",))


@given(indexed_attention_cases(Supports(), Profile.default("float64"), select_all=True))
@settings(max_examples=50, deadline=None)
def test_every_key_can_be_selected(case: IndexedAttentionCase) -> None:
    assert case.top_k >= max(case.seqlens_k)
    assert all(t >= s for s, t in zip(case.seqlens_q, case.seqlens_k, strict=True))
    indices = np.zeros((sum(case.seqlens_q), case.top_k))
    inputs = case.attention_inputs(indices)
    assert inputs.indices.shape == (sum(case.seqlens_q), 1, case.top_k)
    assert len(inputs.kv) == sum(case.seqlens_k)


@pytest.mark.parametrize("name", TOGETHER)
def test_selections_of_the_wrong_width_are_not_asked_for(name: str) -> None:
    class Narrow(TorchAbsorbed):
        supports = Supports(indexer_top_k=(16,), topk_multiple=64)

    record = run_law(LAWS[name], Narrow(), Options(examples=4))
    assert record.verdict == "unsupported"
    assert "sparse_prefill takes" in record.message


class Spoiled(TorchAbsorbed):
    """Operands that ``spoil`` makes of the right ones."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def project_indexer(self, *args: Any, **options: Any) -> Any:
        return self.spoil(*super().project_indexer(*args, **options))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q, k, w: (q, k), "project_indexer must return (q, k, weights), got tuple"),
        (lambda q, k, w: (q.flatten(1), k, w), "q must have shape"),
        (lambda q, k, w: (q, k[:, None], w), "k must have shape"),
        (lambda q, k, w: (q, k.double(), w), "k must be torch.bfloat16, got torch.float64"),
        (lambda q, k, w: (q, k, w.bfloat16()), "weights must be torch.float32, got torch.bfloat16"),
        (lambda q, k, w: (q, k * torch.nan, w), "got nan"),
    ],
)
def test_what_operands_get(spoil: Any, message: str) -> None:
    options = Options(examples=8, dtypes=("bfloat16",))
    record = run_law(LAWS["test_indexer_keys_agree_with_reference"], Spoiled(spoil), options)
    assert record.verdict == "fail"
    assert message in record.message


@pytest.mark.parametrize("name", OPERANDS)
def test_both_operands_in_another_orthogonal_basis_are_not_the_model_s(name: str) -> None:
    """A Hadamard matrix on q and k changes no score: only laws of the operands themselves see it."""

    def flipped(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> Any:
        return q.flip(-1), k.flip(-1), weights

    options = Options(examples=12, dtypes=("float32",))
    verdict = run_law(LAWS[name], Spoiled(flipped), options).verdict
    blind = ("head_weights", "relative_position", "projected_operands", "does_not_modify")
    assert verdict == ("pass" if any(word in name for word in blind) else "fail")


@pytest.mark.parametrize("name", TOGETHER)
def test_indices_of_either_width_are_passed_on(name: str) -> None:
    class Long(TorchAbsorbed):
        def indexer(self, *args: Any, **options: Any) -> Any:
            logits, indices = super().indexer(*args, **options)
            return logits, indices.long()

    assert run_law(LAWS[name], Long(), Options(examples=12)).verdict == "pass"
