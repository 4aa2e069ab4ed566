"""Recorded shapes become cases; a bad line is one sentence that names the value and what was expected."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.operations.all import OPERATIONS
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.quantised_decode import QuantisedDecodeCase
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.sparse import SparseDecodeCase
from mla_spec.operations.workload import LINES, WorkloadError, read_workload
from mla_spec.operations.workload_line import ELEMENTS, REQUIRED
from mla_spec.subjects.driver import Driver

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "production.md").read_text(encoding="utf-8")


def written(tmp_path: Path, *lines: Any) -> str:
    path = tmp_path / "shapes.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_each_operation_becomes_its_case(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"operation": "decode", "seqlens": [70, 3], "s": 2, "num_heads": 16, "page_size": 32, "causal": False},
        "",
        {"operation": "prefill", "seqlens_q": [4, 2], "num_heads": 3},
        {"operation": "prefill", "seqlens_q": [4, 2], "seqlens_k": [9, 2], "num_heads": 3},
        {"operation": "decode_quantized", "seqlens": [5], "num_heads": 2, "format": "fp8_per_tensor"},
        {"operation": "sparse_decode", "batch": 3, "num_heads": 2, "topk": 64},
    )
    decode, prefill, cached, quantized, sparse = read_workload(path)
    assert decode == DecodeCase(
        dtype="float32",
        seqlens=(70, 3),
        s=2,
        num_heads=16,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        page_size=32,
        causal=False,
    )
    assert isinstance(prefill, PrefillCase)
    assert isinstance(cached, PrefillCase)
    assert (prefill.seqlens_k, cached.seqlens_k) == ((4, 2), (9, 2))
    assert (prefill.qk_head_dim, prefill.v_head_dim) == (192, 128)
    assert isinstance(quantized, QuantisedDecodeCase)
    assert quantized.format == "fp8_per_tensor"
    assert isinstance(sparse, SparseDecodeCase)
    assert (sparse.batch, sparse.topk, sparse.page_size) == (3, 64, 64)


def test_a_large_pool_is_shared_and_every_sequence_has_its_keys(tmp_path: Path) -> None:
    (case,) = read_workload(written(tmp_path, {"operation": "decode", "seqlens": [8192] * 128, "num_heads": 1}))
    assert isinstance(case, DecodeCase)
    inputs = case.build()
    assert inputs.kv_cache.size <= ELEMENTS + 3 * 64 * 576
    used = inputs.block_table[:, :128]
    assert all(len(np.unique(row)) == 128 for row in used)
    assert len({tuple(row) for row in used}) == 128


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2", ":2: not valid JSON: "),
        ("7", ":2: 7 is no JSON object"),
        ({"seqlens": [1]}, ":2: operation is null; expected one of prefill, decode, decode_quantized, sparse_decode"),
        ({"operation": "encode"}, ':2: operation is "encode"; expected one of prefill, '),
        ({"operation": ["decode"]}, ':2: operation is ["decode"]; expected one of prefill, '),
        (
            {"operation": "decode", "seqlens": [4], "num_heads": 1, "head": 3},
            ":2: decode has no field 'head'; expected some of seqlens, s, num_heads, ",
        ),
        ({"operation": "decode", "num_heads": 1}, ":2: seqlens is missing; expected a list of one or more integers"),
        ({"operation": "decode", "seqlens": [4]}, ":2: num_heads is missing; expected an integer of at least 1"),
        (
            {"operation": "decode", "seqlens": [4, -1], "num_heads": 1},
            ":2: seqlens is [4, -1]; expected a list of one or more integers, none negative",
        ),
        ({"operation": "decode", "seqlens": [], "num_heads": 1}, ":2: seqlens is []; expected a list of one or more"),
        ({"operation": "decode", "seqlens": [True], "num_heads": 1}, ":2: seqlens is [true]; expected a list"),
        ({"operation": "decode", "seqlens": 4, "num_heads": 1}, ":2: seqlens is 4; expected a list"),
        (
            {"operation": "decode", "seqlens": [4], "num_heads": 0},
            ":2: num_heads is 0; expected an integer of at least 1",
        ),
        ({"operation": "decode", "seqlens": [4], "num_heads": 1.5}, ":2: num_heads is 1.5; expected an integer"),
        (
            {"operation": "decode", "seqlens": [4], "num_heads": 1, "causal": 1},
            ":2: causal is 1; expected true or false",
        ),
        (
            {"operation": "decode_quantized", "seqlens": [4], "num_heads": 1, "format": "fp6"},
            ':2: format is "fp6"; expected one of fp8_ds_mla, ',
        ),
        (
            {"operation": "decode_quantized", "seqlens": [4], "num_heads": 1, "format": ["x"]},
            ':2: format is ["x"]; expected one of fp8_ds_mla, ',
        ),
        (
            {"operation": "prefill", "seqlens_q": [4, 1], "seqlens_k": [4], "num_heads": 1},
            ":2: seqlens_k is [4]; expected as many lengths as seqlens_q has, 2",
        ),
        (
            {"operation": "prefill", "seqlens_q": [8192] * 9, "num_heads": 128},
            ":2: queries have 1811939328 elements; expected at most 33554432, which a host can hold",
        ),
        (
            {"operation": "decode", "seqlens": [1] * 600, "num_heads": 128},
            ":2: queries have 44236800 elements; expected at most 33554432",
        ),
    ],
)
def test_a_bad_line_is_one_sentence(line: Any, message: str, tmp_path: Path) -> None:
    good = {"operation": "decode", "seqlens": [4], "num_heads": 1}
    path = written(tmp_path, good, line)
    with pytest.raises(WorkloadError) as error:
        read_workload(path)
    assert str(error.value).startswith(path + message)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"none\.jsonl: cannot be read: No such file or directory"):
        read_workload(str(tmp_path / "none.jsonl"))
    with pytest.raises(WorkloadError, match="holds no line; expected one JSON object a line"):
        read_workload(written(tmp_path, ""))
    (tmp_path / "shapes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(WorkloadError, match="cannot be read: 'utf-8' codec"):
        read_workload(str(tmp_path / "shapes.jsonl"))


def test_the_page_lists_every_field() -> None:
    table = PAGE.partition("<!-- fields: begin -->")[2].partition("<!-- fields: end -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*?) \| ?(.*?) ?\|$", table, flags=re.MULTILINE)

    def default(value: Any) -> str:
        if value is REQUIRED:
            return ""
        return "`seqlens_q`" if value is None else str(value).lower()

    assert rows == [
        (operation, name, field.expected, default(field.default))
        for operation, line in LINES.items()
        for name, field in line.fields.items()
    ]


def test_every_field_is_one_of_its_case() -> None:
    assert len(LINES) >= 4
    for operation, line in LINES.items():
        assert set(line.fields) <= {field.name for field in fields(OPERATIONS[operation].case)}


def test_a_folder_of_recorded_calls_is_its_shapes(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    given = read_workload(
        written(
            tmp_path / "given",
            {"operation": "decode", "seqlens": [70, 3], "s": 2, "num_heads": 6, "page_size": 32, "causal": False},
            {"operation": "prefill", "seqlens_q": [4, 2], "seqlens_k": [9, 2], "num_heads": 3, "v_head_dim": 16},
            {"operation": "decode_quantized", "seqlens": [5], "num_heads": 2, "format": "fp8_per_tensor"},
            {"operation": "sparse_decode", "batch": 3, "num_heads": 2, "topk": 64, "pages": 2},
        )
    )
    recorded = mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"), rate=1)
    named = {OPERATIONS[name].case: OPERATIONS[name] for name in LINES}
    assert {type(case) for case in given} == set(named)
    for case in given:
        operation = named[type(case)]
        for seed in (case.seed, case.seed + 1):  # other numbers, the same shape
            case = replace(case, seed=seed)
            driver = Driver(recorded, case.dtype)
            driver.call(operation, operation.build(case))
    pool = torch.zeros(2, 4, 1, 5)
    recorded.write_cache(torch.ones(1, 3), torch.ones(1, 2), pool, torch.tensor([1]))
    ragged = RaggedDecodeCase(dtype="float32", seqlens_q=(2, 2), seqlens_k=(9, 3), num_heads=2, page_size=4)
    for case in (ragged, replace(ragged, seqlens_q=(1, 2))):
        driver.call(OPERATIONS["ragged_decode"], case.build())
    assert recorded.recording.taken == 11
    found = read_workload(str(tmp_path / "calls"))
    shapes = {(type(case), *(getattr(case, f.name) for f in fields(case) if f.name in LINE)) for case in found}
    packed = DecodeCase(dtype="float32", seqlens=(9, 3), s=2, num_heads=2, kv_lora_rank=1, page_size=4)
    wanted = [*given, packed]
    assert shapes == {(type(case), *(getattr(case, f.name) for f in fields(case) if f.name in LINE)) for case in wanted}
    assert len(found) == len(wanted)


LINE = {name for line in LINES.values() for name in line.fields}


def test_a_folder_without_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="holds no recorded calls"):
        read_workload(str(tmp_path))
    recorded = mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"), rate=1)
    recorded.merge(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(WorkloadError, match="holds no recorded call of prefill, decode"):
        read_workload(str(tmp_path / "calls"))
