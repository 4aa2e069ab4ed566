"""Cases of sparse attention and of the indexer: ids, contents, and what the law of selection accepts."""

from __future__ import annotations

from dataclasses import replace
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
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.properties.strategies.indexer import indexer_cases
from mla_spec.properties.strategies.sparse import sparse_decode_cases, sparse_prefill_cases
from mla_spec.reference.formats import round_to
from mla_spec.subjects.supports import DTYPES, Supports

ANY_CASE = st.one_of(
    strategy(Supports(), Profile.default(dtype))
    for dtype in DTYPES
    for strategy in (sparse_prefill_cases, sparse_decode_cases, indexer_cases)
)
SPARSE = st.one_of(
    strategy(Supports(), Profile.default("float16")) for strategy in (sparse_prefill_cases, sparse_decode_cases)
)


@given(ANY_CASE)
@settings(max_examples=100, deadline=None)
def test_the_id_holds_the_whole_case(case: Case) -> None:
    assert parse_case(case.id) == case


@given(SPARSE)
@settings(max_examples=100, deadline=None)
def test_sparse_inputs_are_representable_and_keep_their_promises(case: SparsePrefillCase | SparseDecodeCase) -> None:
    inputs, again = case.build(), case.build()
    for name, x in vars(inputs).items():
        np.testing.assert_array_equal(x, getattr(again, name))
    assert np.array_equal(round_to(inputs.q, "float16"), inputs.q)
    assert np.array_equal(round_to(inputs.kv, "float16"), inputs.kv)
    assert inputs.entries.shape == (*inputs.q.shape[:-2], case.topk)
    assert (inputs.entries >= -1).all()
    selecting = (inputs.entries >= 0) & (inputs.entries < len(inputs.rows))
    if not case.empty_rows:
        assert (selecting[..., 0] if case.with_length else selecting.any(axis=-1)).all()
        assert inputs.topk_length is None or (inputs.topk_length >= 1).all()
    if not case.duplicates:
        for row, valid in zip(inputs.entries.reshape(-1, case.topk), selecting.reshape(-1, case.topk), strict=True):
            assert len(set(row[valid].tolist())) == valid.sum()
    assert (inputs.attn_sink is None) == (case.sink == "none")
    assert (inputs.topk_length is None) != case.with_length


def test_cases_have_holes_repetitions_indices_beyond_and_both_infinities() -> None:
    case = SparsePrefillCase(
        dtype="float32",
        s_q=6,
        s_kv=20,
        topk=16,
        num_heads=16,
        invalid=0.3,
        duplicates=True,
        empty_rows=True,
        sink="infinite",
    )
    entries, sink = case.build().entries, case.build().attn_sink
    assert (entries == -1).any()
    assert (entries >= 20).any()
    assert any(len(set(row[(row >= 0) & (row < 20)])) < ((row >= 0) & (row < 20)).sum() for row in entries)
    assert sink is not None
    assert {np.inf, -np.inf} < set(sink.tolist())


def test_supports_narrows_what_is_drawn() -> None:
    supports = Supports(
        topk_multiple=64,
        attention_sink=False,
        topk_length=False,
        latent_dims=((16, 8),),
        empty_row="unsupported",
        indexer_dims=((4, 128),),
        indexer_top_k=(2048,),
    )
    profile = Profile.default("float32")

    @given(sparse_prefill_cases(supports, profile), indexer_cases(supports, profile))
    @settings(max_examples=50, deadline=None)
    def drawn(sparse: SparsePrefillCase, indexer: IndexerCase) -> None:
        assert sparse.topk % 64 == 0
        assert (sparse.sink, sparse.with_length, sparse.empty_rows) == ("none", False, False)
        assert (sparse.kv_lora_rank, sparse.qk_rope_head_dim) == (16, 8)
        assert (indexer.num_heads, indexer.head_dim, indexer.top_k) == (4, 128, 2048)

    drawn()


def test_queries_see_their_own_sequence_up_to_themselves() -> None:
    inputs = IndexerCase(dtype="float32", seqlens_q=(2, 3, 0, 1), seqlens_k=(4, 1, 2, 1)).build()
    assert inputs.first_key.tolist() == [0, 0, 4, 4, 4, 7]
    assert inputs.end_key.tolist() == [3, 4, 4, 4, 5, 8]


class Selecting(TorchAbsorbed):
    """An indexer that returns what ``spoil`` makes of the right indices."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def indexer(self, *args: Any, **options: Any) -> Any:
        logits, indices = super().indexer(*args, **options)
        return logits, self.spoil(indices)


@pytest.mark.parametrize(
    ("spoil", "verdict", "message"),
    [
        (lambda x: x, "pass", ""),
        (lambda x: x.long(), "pass", ""),
        (lambda x: x.float(), "fail", "indices must be torch.int32 or torch.int64, got torch.float32"),
        (lambda x: x[:, :-1], "fail", "indices must have shape"),
        (lambda x: x.clamp(min=0), "fail", "must be -1 from entry"),
        (lambda x: torch.where(x < 0, x, x[:, :1]), "fail", "a key is named twice"),
        (lambda x: torch.where(x < 0, x, x + 1), "fail", "is no key that it sees"),
        (lambda x: torch.full_like(x, -1), "fail", "is no key that it sees"),
    ],
)
def test_what_a_selection_gets(spoil: Any, verdict: str, message: str) -> None:
    law = all_laws()["test_indexer_selects_the_largest_logits"]
    record = run_law(law, Selecting(spoil), Options(examples=40, dtypes=("float32",)))
    assert record.verdict == verdict, record.text()
    assert message in record.message


def test_any_order_of_a_selection_passes_and_the_next_largest_does_not() -> None:
    laws = all_laws()
    options = Options(examples=40, dtypes=("bfloat16",))

    def reverse(indices: torch.Tensor) -> torch.Tensor:
        count = (indices >= 0).sum(dim=-1, keepdim=True)  # [tokens, 1]
        place = torch.arange(indices.shape[1])
        return indices.gather(1, torch.where(place < count, count - 1 - place, place))

    class OneTooMany(TorchAbsorbed):
        """Selects the largest but one in place of the largest."""

        def largest(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
            order = super().largest(logits, top_k + 1)
            return order[:, 1:] if order.shape[1] > top_k else order

    for name in ("test_indexer_selects_the_largest_logits", "test_indexer_ties_go_to_the_smaller_index"):
        assert run_law(laws[name], Selecting(reverse), options).verdict == "pass"
        assert run_law(laws[name], OneTooMany(), options).verdict == "fail"


def test_a_subject_may_leave_ties_open_and_return_no_logits() -> None:
    class Open(TorchAbsorbed):
        supports = Supports(indexer_ties="any", indexer_logits=False)

        def indexer(self, *args: Any, **options: Any) -> Any:
            return None, super().indexer(*args, **options)[1]

        def largest(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
            return logits.shape[-1] - 1 - super().largest(logits.flip(-1), top_k)

    verdicts = {
        name: run_law(law, Open(), Options(examples=40, minimise=False)).verdict
        for name, law in all_laws().items()
        if law.needs == ("indexer",)
    }
    unsupported = {"test_indexer_logits_agree_with_reference", "test_indexer_ties_go_to_the_smaller_index"}
    assert verdicts == {name: "unsupported" if name in unsupported else "pass" for name in verdicts}


def verdicts(subject: object) -> set[str]:
    """The verdicts of all laws of sparse attention that run by default."""
    laws = [law for law in all_laws().values() if "sparse" in law.needs[0] and not law.unavailable(Options())]
    options = Options(examples=12, dtypes=("float32",), minimise=False)
    return {run_law(law, subject, options).verdict for law in laws}


def test_a_subject_may_have_no_rule_for_rows_without_keys() -> None:
    class NeverEmpty(TorchAbsorbed):
        supports = Supports(empty_row="unsupported")

        def attend_rows(self, q: Any, rows: Any, selected: torch.Tensor, *args: Any) -> Any:
            assert selected.any(dim=-1).all()
            return super().attend_rows(q, rows, selected, *args)

    assert verdicts(NeverEmpty()) == {"pass", "unsupported"}


def test_a_subject_may_give_rows_without_keys_another_lse() -> None:
    class PlusInfinity(TorchAbsorbed):
        """As FlashMLA does."""

        supports = Supports(empty_row="zero/+inf")

        def softmax(self, scores: torch.Tensor) -> Any:
            weights, lse = super().softmax(scores)
            return weights, lse.masked_fill(lse == -torch.inf, torch.inf)

        def sink_share(self, lse: torch.Tensor, attn_sink: torch.Tensor) -> torch.Tensor:
            return super().sink_share(lse.masked_fill(lse == torch.inf, -torch.inf), attn_sink)

    class Undeclared(PlusInfinity):
        supports = Supports()

    assert verdicts(PlusInfinity()) == {"pass"}
    law = all_laws()["test_sparse_decode_of_nothing"]
    assert run_law(law, Undeclared(), Options(examples=12, minimise=False)).verdict == "fail"


def test_what_sparse_prefill_returns_is_checked() -> None:
    class OutAndLse(TorchAbsorbed):
        def sparse_prefill(self, *args: Any, **options: Any) -> Any:
            out, _, lse = super().sparse_prefill(*args, **options)
            return out, lse

    law = all_laws()["test_sparse_prefill_agrees_with_reference"]
    record = run_law(law, OutAndLse(), Options(examples=4))
    assert record.verdict == "fail"
    assert "sparse_prefill must return (out, max_logits, lse), got tuple" in record.message


def test_half_of_long_rows_with_holes_begin_with_a_tile_of_them() -> None:
    for topk, tile in ((20, 16), (70, 64)):
        case = SparsePrefillCase(dtype="float32", s_q=40, s_kv=100, topk=topk, invalid=0.3)
        entries = case.build().entries
        valid = (entries >= 0) & (entries < 100)
        begin_empty = ~valid[:, :tile].any(axis=1)
        assert 10 < begin_empty.sum() < 30
        assert valid[begin_empty, -1].all()
        assert valid[~begin_empty, 0].all()
        first = replace(case, with_length=True).build().entries[:, 0]
        assert ((first >= 0) & (first < 100)).all()
