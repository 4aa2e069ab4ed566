"""Limits on sequences and keys: no call exceeds them, smaller cases are drawn instead, and a report says what is never seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mla_spec import Options, Supports
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.installed import all_laws
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.extent import Most, beyond
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.layer import LayerCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.sparse import SparseDecodeCase
from mla_spec.subjects.description import describe

BATCH, KEYS = 3, 64
LAWS = [
    name
    for name, law in all_laws().items()
    if law.needs[0] in ("decode", "ragged_decode", "prefill", "sparse_decode", "indexer") and "beyond_2_31" not in name
]


def require(batch: int, lengths: torch.Tensor) -> None:
    if batch > BATCH or int(lengths.max()) > KEYS:
        raise RuntimeError(f"{batch} sequences of up to {int(lengths.max())} keys")


class Unlimited(TorchAbsorbed):
    """Has scratch memory for few sequences and keys, and does not say so."""

    def decode(self, q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, **options: Any) -> Any:
        require(len(cache_seqlens), cache_seqlens)
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)

    def ragged_decode(
        self, q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, cu_seqlens_q: Any, **options: Any
    ) -> Any:
        require(len(cache_seqlens), cache_seqlens)
        return super().ragged_decode(q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, **options)

    def prefill(self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> Any:
        require(len(cu_seqlens_k) - 1, cu_seqlens_k.diff())
        return super().prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)

    def sparse_decode(self, q: Any, kv_cache: Any, indices: Any, **options: Any) -> Any:
        require(len(indices), torch.tensor(indices.shape[-1]))
        return super().sparse_decode(q, kv_cache, indices, **options)

    def indexer(self, q: Any, k: Any, weights: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> Any:
        require(len(cu_seqlens_k) - 1, cu_seqlens_k.diff())
        return super().indexer(q, k, weights, cu_seqlens_q, cu_seqlens_k, **options)


class Limited(Unlimited):
    supports = replace(TorchAbsorbed.supports, max_batch=BATCH, max_keys=KEYS)


class OneSequence(Unlimited):
    supports = replace(TorchAbsorbed.supports, max_batch=1)


def record(subject: Any, law: str) -> Record:
    return run_law(all_laws()[law], subject, Options(examples=6, dtypes=("float32",)))


@pytest.mark.parametrize("law", LAWS)
def test_who_declares_limits_is_not_given_more(law: str) -> None:
    got = record(Limited(), law)
    assert got.verdict in ("pass", "unsupported"), got.text()


@pytest.mark.parametrize("operation", ["decode", "ragged_decode", "prefill", "sparse_decode", "indexer"])
def test_who_does_not_crashes(operation: str) -> None:
    assert record(Unlimited(), f"test_{operation}_at_production_counts").verdict == "crashed"


def test_laws_that_need_more_are_refused() -> None:
    got = record(Limited(), "test_decode_is_exact_at_length")
    assert (got.verdict, got.message) == (
        "unsupported",
        "refused by the subject: max_batch=3, and the case has more",
    )
    got = record(Limited(), "test_decode_memory_grows_with_the_batch")
    assert got.message == "refused by the subject: max_batch=3, and a call has 4"


def test_refused_cases_are_counted() -> None:
    assert (
        "26 of 48 cases refused by the subject: max_keys=64, and the case has more"
        in record(Limited(), "test_decode_at_production_counts").note
    )


def test_one_sequence_is_not_compared_with_itself() -> None:
    for operation in ("decode", "ragged_decode", "sparse_decode", "prefill"):
        law = f"test_{operation}_sequences_are_independent"
        assert record(OneSequence(), law).message == "a call takes one sequence"
    assert record(OneSequence(), "test_sparse_prefill_queries_are_independent").verdict == "pass"


def test_the_report_says_what_is_never_seen() -> None:
    assert describe(Limited()).summary[2] == (
        "  never seen: a call with more than 3 sequences (max_batch=3); a query that sees more than 64 keys (max_keys=64)"
    )
    assert "never seen" not in "".join(describe(TorchAbsorbed()).summary)


FLOAT = {"dtype": "float32"}


@pytest.mark.parametrize(
    ("case", "cut"),
    [
        (DecodeCase(**FLOAT, seqlens=(5, 100, 7, 9)), DecodeCase(**FLOAT, seqlens=(5, 64, 7))),
        (
            PrefillCase(**FLOAT, seqlens_q=(5, 70, 70), seqlens_k=(100, 70, 64)),
            PrefillCase(**FLOAT, seqlens_q=(1, 64, 70), seqlens_k=(64, 64, 64)),
        ),
        (
            IndexerCase(**FLOAT, seqlens_q=(0, 0, 0, 0, 2, 3), seqlens_k=(1, 2, 3, 4, 5, 6)),
            IndexerCase(**FLOAT, seqlens_q=(0, 2, 3), seqlens_k=(4, 5, 6)),
        ),
        (SparseDecodeCase(**FLOAT, batch=9, topk=100), SparseDecodeCase(**FLOAT, batch=3, topk=60)),
        (LayerCase(**FLOAT, batch=2, prompt=100, steps=3), LayerCase(**FLOAT, batch=2, prompt=61, steps=3)),
    ],
)
def test_cases_are_cut(case: Any, cut: Any) -> None:
    most = Most(batch=BATCH, keys=KEYS)
    assert most.cut(case, topk_multiple=20) == cut
    assert most.cut(cut, topk_multiple=20) == cut
    limits = Supports(max_batch=BATCH, max_keys=KEYS, topk_multiple=20)
    assert beyond(case, limits)
    assert beyond(cut, limits) == ""


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_keys"):
        Supports(max_keys=15)
    with pytest.raises(ValueError, match="max_batch"):
        Supports(max_batch=0)
