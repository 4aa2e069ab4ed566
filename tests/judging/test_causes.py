"""From failing laws to causes, and what separates failing from passing cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.judging.causes import causes, with_causes
from mla_spec.judging.check import check_subject
from mla_spec.judging.law import Options
from mla_spec.judging.separation import separation
from mla_spec.judging.verdict import Record
from mla_spec.operations.decode import DecodeCase

CASES = [
    DecodeCase(dtype="float32", seqlens=(n, 3), num_heads=1 + n % 3, regime="ties" if n % 2 else "typical")
    for n in range(1, 20)
]


class Halved(TorchAbsorbed):
    """Of sequences with 9 keys or more, out is half of what it should be."""

    def decode(self, q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, **options: Any) -> Any:
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        return torch.where((cache_seqlens > 8)[:, None, None, None], out / 2, out), lse


def test_the_boundary_between_failing_and_passing_cases_is_found() -> None:
    found = separation([(case, case.seqlens[0] > 8) for case in CASES])
    assert found == {"field": "longest of seqlens", "least": 9, "failing": 11, "passing": 0, "elsewhere": 8}
    found = separation([(case, case.regime == "ties") for case in CASES])
    assert (found["field"], found["is"]) == ("regime", "ties")


def test_cases_that_all_fail_have_no_boundary() -> None:
    assert separation([(case, True) for case in CASES]) == {}
    assert separation([(case, False) for case in CASES]) == {}
    assert separation([(CASES[0], True), (CASES[9], False)]) == {}, "one passing case shows nothing"


def test_one_fault_is_one_cause() -> None:
    laws = (
        "test_prefill_equals_decode",
        "test_decode_one_hot_far_below_zero",
        "test_decode_page_relabelling_changes_nothing",
        "test_decode_agrees_with_reference",
        "test_decode_lse_agrees_with_reference",
    )
    records = check_subject(Halved(), laws=laws, options=Options(examples=40, dtypes=("float32",)))
    (cause,) = causes(records)
    assert cause.lead.law == "test_decode_agrees_with_reference"
    assert "of decode (2 more follow): out is 0.5 times what it should be" in cause.statement
    assert cause.statement.endswith("only where longest of seqlens is at least 9")
    said = [record.law for record in (*cause.alike, *cause.follows)]
    assert sorted(said) == sorted(record.law for record in records if record.verdict == "fail")
    borne = {record.law: record.cause for record in with_causes(records, [cause])}
    assert borne[cause.lead.law]["statement"] == cause.statement
    assert [law for law, each in borne.items() if each.get("follows") == cause.lead.law] == said[1:]


def test_evidence_is_of_the_smallest_and_of_the_richest_case() -> None:
    law = "test_decode_agrees_with_reference"
    (record,) = check_subject(Halved(), laws=[law], options=Options(examples=40, dtypes=("float32",)))
    assert record.evidence[0]["case"] == record.case
    assert record.evidence[0]["wrong"] < record.evidence[-1]["wrong"]
    assert Record(**record.as_dict()) == record


def test_operations_and_crashes_are_causes_of_their_own() -> None:
    def failed(law: str, message: str = "wrong", **changes: Any) -> Record:
        return replace(Record(law, "mine", "fail", cases=1, message=message), **changes)

    crash = failed("test_decode_last_key_matters", "IndexError: out of range (mine.py:3)", verdict="crashed")
    records = [crash, failed("test_rope_preserves_norm"), failed("test_decode_agrees_with_reference")]
    found = causes(records)
    assert [cause.operation for cause in found] == ["rope", "decode", "decode"]
    assert found[-1].lead is crash
    assert causes([Record("test_rope_preserves_norm", "mine", "pass", cases=1)]) == []
