"""Rows of a call, taken out: the exact results of the part are those of the whole."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.bounds.profile import Profile
from mla_spec.exchange.call import Call, call_of, read_call
from mla_spec.exchange.rows import choose_rows
from mla_spec.operations.all import OPERATIONS
from mla_spec.operations.case import Case
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.operation import Operation, Within
from mla_spec.operations.quantised_decode import QuantisedDecodeCase
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.sparse import SparseDecodeCase
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import Supports

SIZES: dict[str, Any] = {"dtype": "float32", "num_heads": 6, "kv_lora_rank": 5, "qk_rope_head_dim": 2, "page_size": 4}
CASES: dict[str, Case] = {
    "decode": DecodeCase(**SIZES, seqlens=(9, 0, 17, 4), s=2),
    "decode, sinks and a window": DecodeCase(**SIZES, seqlens=(9, 17), s=2, sink="finite", window=6),
    "ragged_decode": RaggedDecodeCase(**SIZES, seqlens_q=(1, 4, 0, 3), seqlens_k=(9, 7, 5, 2)),
    "ragged_decode, every key": RaggedDecodeCase(**SIZES, seqlens_q=(1, 4), seqlens_k=(9, 7), causal=False),
    "sparse_decode": SparseDecodeCase(
        **SIZES, batch=3, s=2, pages=7, topk=9, invalid=0.3, duplicates=True, with_length=True, sink="finite"
    ),
    "decode_quantized": QuantisedDecodeCase(dtype="bfloat16", num_heads=6, seqlens=(9, 3), page_size=4),
}


class Keeps:
    """A subject that keeps the arguments of the one call that it gets."""

    supports = Supports()

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        setattr(self, operation.name, self._keep)

    def _keep(self, *places: Any, **options: Any) -> Any:
        self.call = call_of(self.operation, places, options)
        raise KeyboardInterrupt


def whole_call(operation: Operation, case: Case) -> Call:
    subject, inputs = Keeps(operation), operation.build(case)
    driver = Driver(subject, case.dtype)
    with pytest.raises(KeyboardInterrupt):
        driver.raw(operation, inputs, driver.tensors(operation, inputs))
    return subject.call


def exact(operation: Operation, call: Call) -> dict[str, torch.Tensor]:
    """Exact outputs of a call as it is recorded."""
    assert operation.recorded is not None
    inputs = operation.recorded(read_call(call.encoded(), "a call").inputs())
    wants = operation.expected(inputs, Profile.default("bfloat16"), Supports())
    found = {}
    for output, want in zip(operation.outputs, wants, strict=True):
        assert isinstance(want, Within)
        found[output.name] = torch.from_numpy(np.array(want.value))
    return found


def whole(name: str) -> tuple[Operation, Call]:
    operation = OPERATIONS[name.partition(",")[0]]
    assert isinstance(operation, Operation)
    return operation, whole_call(operation, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_rows_have_the_results_that_they_have_in_the_whole(name: str) -> None:
    operation, call = whole(name)
    answer, drawn, seen = exact(operation, call), random.Random(0), set()
    for _ in range(12):
        part = choose_rows(call, drawn, heads=2)
        assert part is not None
        assert part.heads == (2, 6)
        want, got = part.outputs(answer), exact(operation, part.call)
        for output, x in want.items():
            assert x.shape == got[output].shape
            torch.testing.assert_close(x, got[output])
        seen.add(part.call.encoded())
    assert len(seen) > 6


def test_rows_take_no_more_of_the_cache_than_they_need() -> None:
    for name in CASES:
        _, call = whole(name)
        pool = "pages" if name == "decode_quantized" else "kv_cache"
        page_size = 4
        part = choose_rows(call, random.Random(1))
        assert part is not None
        kept = part.call.tensors[pool]
        if name == "sparse_decode":
            used = int((part.call.tensors["indices"].max() + 1).clamp(min=1))
        else:
            used = int(part.call.tensors["cache_seqlens"][0])
        assert len(kept) == -(-used // page_size)


@pytest.mark.parametrize(("scale", "heads"), [("none", 2), ("head", 2), ("token", 6), ("tensor", None)])
def test_rows_that_share_a_scale_stay_together(scale: str, heads: int | None) -> None:
    _, call = whole("decode")
    part = choose_rows(call, random.Random(0), 2, scale)
    assert (None if part is None else part.heads[0]) == heads


def test_what_has_no_rows_is_left_whole() -> None:
    operation, call = whole("decode")
    empty = replace(call, tensors={**call.tensors, "q": call.tensors["q"][:0]})
    assert choose_rows(empty, random.Random(0)) is None
    merge = Call("merge", {"outs": torch.ones(1, 1, 1, 1), "lses": torch.ones(1, 1, 1)}, {})
    assert choose_rows(merge, random.Random(0)) is None
    assert operation.name == "decode"
