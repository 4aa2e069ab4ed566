"""Inputs from which a wrong value says which key was read."""

from __future__ import annotations

from typing import Any

import torch

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.rope import RopeCase
from mla_spec.proof.telltale import telltale
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


class Bfloat16Only(FirstTable):
    supports = Supports(dtypes=("bfloat16",))


def test_a_right_subject_has_nothing_to_tell() -> None:
    assert telltale(TorchAbsorbed(), CASE) == []


def test_the_table_of_another_sequence_is_seen() -> None:
    told = telltale(FirstTable(), CASE)
    assert told[0] == "2 of 3 sequences, such as 1: reads the table row of sequence 0"
    assert len(told) == len(set(told))


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
