"""Inputs from which a wrong value says which key was read."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.rope import RopeCase
from mla_spec.proof.telltale import telltale
from mla_spec.subjects.process import apart
from mla_spec.subjects.supports import Supports

CASE = DecodeCase(dtype="float32", seqlens=(5, 7), num_heads=2, kv_lora_rank=4, page_size=4)


class FirstTable(TorchAbsorbed):
    def gather_batch(self, kv_cache: Any, block_table: Any, cache_seqlens: Any) -> Any:
        return super().gather_batch(kv_cache, block_table[:1].expand_as(block_table), cache_seqlens)


class WithoutLast(TorchAbsorbed):
    def visible(self, s: int, t: int, seqlens: Any, causal: bool) -> Any:
        return super().visible(s, t, seqlens - 1, causal)


class Doubled(TorchAbsorbed):
    def decode(self, *arguments: Any, **options: Any) -> Any:
        out, lse = super().decode(*arguments, **options)
        return out + 0.3, lse


class Raises(TorchAbsorbed):
    def decode(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no")


class Ends(TorchAbsorbed):
    def decode(self, *arguments: Any, **options: Any) -> Any:
        os._exit(0)


class Bfloat16Only(FirstTable):
    supports = Supports(dtypes=("bfloat16",))


def test_a_right_subject_has_nothing_to_tell() -> None:
    assert telltale(TorchAbsorbed(), CASE) == []


def test_the_table_of_another_sequence_is_seen() -> None:
    told = telltale(FirstTable(), CASE)
    assert told[0] == "2 of 3 sequences, such as 1: reads the table row of sequence 0"
    assert len(told) == len(set(told))


def test_a_subject_in_a_process_of_its_own_tells_the_same() -> None:
    with apart(f"{__file__}:FirstTable") as subject:
        assert telltale(subject, CASE) == telltale(FirstTable(), CASE)
    with apart(f"{__file__}:Ends") as subject:
        assert telltale(subject, CASE) == []


def test_a_lost_key_is_seen() -> None:
    assert telltale(WithoutLast(), CASE) == ["3 of 3 sequences, such as 0: does not read its last key"]


def test_numbers_of_no_slot_are_no_keys() -> None:
    assert telltale(Doubled(), CASE) == []


def test_pages_and_heads_like_those_of_kernels_are_exact() -> None:
    wide = DecodeCase(dtype="bfloat16", num_heads=16, kv_lora_rank=512, qk_rope_head_dim=64, page_size=64)
    assert telltale(TorchAbsorbed(), wide) == []
    assert "reads the table row of sequence 0" in telltale(FirstTable(), wide)[0]


def test_what_cannot_be_asked_is_not() -> None:
    assert telltale(Bfloat16Only(), CASE) == []
    assert telltale(FirstTable(), RopeCase(dtype="float32")) == []
    assert telltale(Raises(), CASE) == []
    assert torch.is_grad_enabled()


PREFILL = PrefillCase(dtype="float32", seqlens_q=(2, 3), seqlens_k=(4, 6), num_heads=2, qk_head_dim=4, v_head_dim=2)


class Prefill(TorchAbsorbed):
    """Rolls an argument of prefill."""

    def change(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> tuple[Any, ...]:
        return q, k, v, cu_q, cu_k

    def prefill(self, *arguments: Any, **options: Any) -> Any:
        return super().prefill(*self.change(*arguments), **options)


class OtherHead(Prefill):
    def change(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> tuple[Any, ...]:
        return q, k, v.flip(1), cu_q, cu_k


class KeyOffByOne(Prefill):
    def change(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> tuple[Any, ...]:
        return q, k, torch.cat([v[:1], v[:-1]]), cu_q, cu_k


class FirstSequence(Prefill):
    def change(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> tuple[Any, ...]:
        longest = int((cu_k[1:] - cu_k[:-1])[0])
        return q, k, v[torch.arange(len(v)) % longest], cu_q, cu_k


@pytest.mark.parametrize(
    ("subject", "sentence"),
    [
        (OtherHead, "prefill reads values of another head, such as 1 for 0"),
        (KeyOffByOne, "prefill reads a key 1 before the right one"),
        (FirstSequence, "prefill reads keys of another sequence, such as 0 for 1"),
    ],
)
def test_what_a_prefill_reads_is_seen(subject: type, sentence: str) -> None:
    assert any(told.startswith(sentence) for told in telltale(subject(), PREFILL)), telltale(subject(), PREFILL)
    assert telltale(TorchAbsorbed(), PREFILL) == []


class Rope(TorchAbsorbed):
    """Changes an argument of rope, or its result."""

    def rope(self, x: Any, positions: Any, *, rope: Any) -> Any:
        return super().rope(x, *self.change(positions, rope)[:1], rope=self.change(positions, rope)[1])

    def change(self, positions: Any, rope: Any) -> tuple[Any, Any]:
        return positions, rope


class Later(Rope):
    def change(self, positions: Any, rope: Any) -> tuple[Any, Any]:
        return positions + 1, rope


class Backwards(Rope):
    def change(self, positions: Any, rope: Any) -> tuple[Any, Any]:
        return -positions, rope


class OtherLayout(Rope):
    def change(self, positions: Any, rope: Any) -> tuple[Any, Any]:
        return positions, replace(rope, interleaved=not rope.interleaved)


class Longer(Rope):
    def rope(self, x: Any, positions: Any, *, rope: Any) -> Any:
        return 1.5 * super().rope(x, positions, rope=rope)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(
    ("subject", "sentence"),
    [
        (Later, "rope turns as at the position 4 in place of 3 (8 of 8 columns)"),
        (Backwards, "rope turns backwards (8 of 8 columns)"),
        (OtherLayout, "rope pairs columns as others, such as 0 with"),
        (Longer, "rope changes the length of a vector by the factor 1.5 in place of 1 (8 of 8 columns)"),
    ],
)
def test_how_a_rope_turns_is_seen(subject: type, sentence: str, layout: str) -> None:
    case = RopeCase(dtype="bfloat16", dim=8, layout=layout, theta=10.0)
    assert telltale(subject(), case)[0].startswith(sentence), telltale(subject(), case)
    assert telltale(TorchAbsorbed(), case) == []
