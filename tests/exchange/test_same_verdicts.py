"""Shipped subjects and planted bugs, live and by files: the same records, law by law."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_spec.exchange.contents import answer_by
from mla_spec.exchange.folder import Folder, read_calls
from mla_spec.exchange.record import plain_description
from mla_spec.front.cli import main
from mla_spec.installed import all_laws, operation_named, operation_names
from mla_spec.planted_bugs import PLANTED
from mla_spec.subjects.description import describe
from mla_spec.subjects.find import resolve_subject
from mla_spec.subjects.signature import Signature
from tests.exchange.test_files import COMPARED, records

LAWS = {
    "absorb": "test_absorb_splits_kv_b_proj",
    "decode": "test_decode_ignores_unused_cache_slots",
    "decode_quantized": "test_quantised_decode_agrees_with_reference",
    "dequantize_cache": "test_dequantised_rows_are_code_times_scale",
    "dequantize_weight": "test_dequantised_weight_is_code_times_scale_of_its_block",
    "indexer": "test_indexer_of_projected_operands",
    "merge": "test_merge_of_decoded_parts_is_the_whole",
    "prefill": "test_prefill_ignores_future_keys",
    "project_indexer": "test_indexer_keys_agree_with_reference",
    "quantize_cache": "test_codes_are_the_nearest",
    "ragged_decode": "test_ragged_decode_equals_decode",
    "rank_decode": "test_rank_decode_of_one_rank_is_decode",
    "rope": "test_rope_layouts_are_equivalent",
    "sparse_decode": "test_sparse_decode_sequences_are_independent",
    "sparse_prefill": "test_sparse_prefill_of_nothing",
    "write_cache": "test_decode_reads_what_write_cache_wrote",
}
"""A law of each operation."""

BUGS = ("B6", "E7-merge", "F18", "I1-dequantize_cache", "C5")

BREAKS = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel(TorchAbsorbed):
    name = "breaks"

    def merge(self, outs, lses):
        out, lse = super().merge(outs, lses)
        {}
"""


def same_records(folder: Path, subject: str, laws: list[str], *options: str) -> set[str]:
    """The verdicts of some laws, which are the same on a subject and on the answers that it gave to what was exported."""
    calls, found = folder / "calls", resolve_subject(subject)
    declared = folder / "declared.json"
    declared.write_text(json.dumps(plain_description(describe(found))), encoding="utf-8")
    named = [word for law in laws for word in ("--law", law)]
    assert main(["export", str(calls), "--subject", str(declared), *named, *options, "--seed", "0"]) == 0
    known = -1
    while known != (known := len(Folder.opened(str(calls)).known)):
        exported = Folder.opened(str(calls))
        for name, call in read_calls(exported):
            if not exported.has_answer(name):
                exported.put_answer(name, answer_by(found, call))
        assert main(["export", str(calls)]) == 0
    by_files, live = folder / "by_files.json", folder / "live.json"
    code = main(["judge", str(calls), "--json", str(by_files), "--in-process"])
    line = ["check", subject, *named, *options, "--seed", "0", "--no-minimise", "--in-process", "--json", str(live)]
    assert main(line) == code
    wanted = {law: {name: record[name] for name in COMPARED} for law, record in records(live).items()}
    assert {law: {name: record[name] for name in COMPARED} for law, record in records(by_files).items()} == wanted
    return {record["verdict"] for record in wanted.values()}


def test_each_operation_has_a_law_here() -> None:
    assert set(LAWS) == {name for name in operation_names() if isinstance(operation_named(name), Signature)}
    for operation, law in LAWS.items():
        assert operation in all_laws()[law].needs
        assert not all_laws()[law].live


@pytest.mark.parametrize(
    ("subject", "dtype", "verdicts"),
    [("torch-explicit", "bfloat16", {"pass"}), ("torch-sdpa", "float32", {"pass", "unsupported"})],
)
def test_a_correct_subject_passes_both_ways(subject: str, dtype: str, verdicts: set[str], tmp_path: Path) -> None:
    assert same_records(tmp_path, subject, list(LAWS.values()), "--examples", "1", "--dtype", dtype) == verdicts


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_both_ways_with_the_same_message(bug: str, tmp_path: Path) -> None:
    law = next(law for law in PLANTED[bug].killed_by if not all_laws()[law].live)
    assert same_records(tmp_path, PLANTED[bug].spec, [law], "--examples", "12") == {"fail"}


@pytest.mark.parametrize(
    "breaks",
    [
        "return [out, lse]",
        "return out",
        "return out, lse.tolist()",
        "return out, None",
        "return out.to_sparse(), lse",
        "return out[..., None], lse",
        "return out.double(), lse",
        "raise IndexError('of its own')",
        "raise SystemExit(3)",
    ],
)
def test_what_breaks_the_contract_is_told_as_of_a_live_subject(breaks: str, tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(BREAKS.format(breaks), encoding="utf-8")
    options = ("--examples", "1", "--dtype", "float32")
    verdicts = same_records(tmp_path, f"{tmp_path}/kernel.py:Kernel", ["test_merge_agrees_with_reference"], *options)
    assert verdicts == {"crashed" if breaks.startswith("raise") else "fail"}
