"""Inputs from which a wrong value says which key was read."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.judging.telltale import telltale as findings
from mla_spec.operations.case import Case
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.layer import LayerCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.rope import RopeCase
from mla_spec.subjects.description import declared_by, describe
from mla_spec.subjects.process import apart
from mla_spec.subjects.supports import Supports


def telltale(subject: object, case: Case) -> list[str]:
    return [found.says for found in findings(subject, case, describe(subject))]


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
    for name, told in (
        ("FirstTable", telltale(FirstTable(), CASE)),
        ("WholeLayer", telltale(WholeLayer(), LAYER)),
        ("Ends", []),
    ):
        case = LAYER if name == "WholeLayer" else CASE
        with apart(f"{__file__}:{name}") as subject:
            assert [found.says for found in findings(subject, case, declared_by(subject))] == told


def test_a_lost_key_is_seen() -> None:
    assert telltale(WithoutLast(), CASE) == ["3 of 3 sequences, such as 0: does not read its last key"]


def test_numbers_of_no_slot_are_no_keys() -> None:
    assert telltale(Doubled(), CASE) == ["out is off by one amount everywhere, whatever the weights and the values are"]


def test_pages_and_heads_like_those_of_kernels_are_exact() -> None:
    wide = DecodeCase(dtype="bfloat16", num_heads=16, kv_lora_rank=512, qk_rope_head_dim=64, page_size=64)
    assert telltale(TorchAbsorbed(), wide) == []
    assert "reads the table row of sequence 0" in telltale(FirstTable(), wide)[0]


def test_what_cannot_be_asked_is_not() -> None:
    assert telltale(Bfloat16Only(), CASE) == []
    assert telltale(FirstTable(), RopeCase(dtype="float32")) == []
    assert telltale(Raises(), CASE) == []
    assert torch.is_grad_enabled()


class Wrong(TorchAbsorbed):
    """Attention in which one step is wrong."""

    def scores(self, q: Any, k: Any, softmax_scale: float) -> Any:
        return self.changed(super().scores(q, k, softmax_scale), q, k, softmax_scale)

    def changed(self, scores: Any, q: Any, k: Any, scale: float) -> Any:
        return scores


class Steeper(Wrong):
    def changed(self, scores: Any, q: Any, k: Any, scale: float) -> Any:
        return 1.25 * scores


class WithoutRopePart(Wrong):
    def changed(self, scores: Any, q: Any, k: Any, scale: float) -> Any:
        return super(Wrong, self).scores(q[..., :64], k[..., :64], scale)


class HeadsReversed(Wrong):
    def changed(self, scores: Any, q: Any, k: Any, scale: float) -> Any:
        return scores.flip(1)


class NotRescaled(Wrong):
    def changed(self, scores: Any, q: Any, k: Any, scale: float) -> Any:
        return torch.cat([scores[..., :4], scores[..., 4:] + 0.5], dim=-1)


class SumOfTwo(TorchAbsorbed):
    def weighted_values(self, p: Any, v: Any) -> Any:
        return 2 * super().weighted_values(p, v)


class TopLeft(TorchAbsorbed):
    def visible(self, s: int, t: int, seqlens: Any, causal: bool) -> Any:
        return super().visible(s, t, seqlens, False) & torch.ones(s, t, dtype=torch.bool).tril()


class SeesAll(TorchAbsorbed):
    def visible(self, s: int, t: int, seqlens: Any, causal: bool) -> Any:
        return super().visible(s, t, seqlens, False)


class RoundedValues(TorchAbsorbed):
    def weighted_values(self, p: Any, v: Any) -> Any:
        return super().weighted_values(p, v.to(torch.float8_e5m2).to(v.dtype))


class OtherLogarithm(TorchAbsorbed):
    def softmax(self, scores: Any) -> Any:
        weights, lse = super().softmax(scores)
        return weights, lse / 2


WEIGHTS = DecodeCase(
    dtype="bfloat16", seqlens=(13, 9), s=3, num_heads=2, kv_lora_rank=64, qk_rope_head_dim=8, page_size=4, logit_std=2.0
)


@pytest.mark.parametrize(
    ("subject", "topic", "sentence"),
    [
        (Steeper, "scores", "scores are 1.25 times what they should be"),
        (WithoutRopePart, "scores", "the rope part of the scores is left out"),
        (HeadsReversed, "heads", "has the weights of head"),
        (NotRescaled, "softmax", "weights of the keys from 4 on have another factor than those before"),
        (SumOfTwo, "softmax", "weights are 2 times what they should be"),
        (TopLeft, "mask", "sees its first 1 keys only"),
        (SeesAll, "mask", "query 0 of sequence 0 sees key 11, which it should not"),
        (RoundedValues, "values", "where values are 0 and 1 every weight is right"),
        (OtherLogarithm, "lse", "the LSE alone is wrong"),
    ],
)
def test_what_is_wrong_with_weights_is_seen(subject: type, topic: str, sentence: str) -> None:
    made = subject()
    made.supports = Supports(dtypes=("float64", "bfloat16"))  # without float32, in which pages are looked at first
    for dtype in made.supports.dtypes:
        (found,) = findings(made, replace(WEIGHTS, dtype=dtype), describe(made))
        assert (found.topic, sentence in found.says) == (topic, True), (dtype, found)


def test_the_weights_of_a_right_subject_tell_nothing() -> None:
    made = TorchAbsorbed()
    made.supports = Supports(dtypes=("float64", "bfloat16"))
    packed = PrefillCase(dtype="float64", seqlens_q=(2, 3), seqlens_k=(4, 6), num_heads=2, qk_head_dim=4, v_head_dim=2)
    for case in (WEIGHTS, replace(WEIGHTS, dtype="float64", kv_lora_rank=2), replace(WEIGHTS, causal=False), packed):
        assert findings(made, case, describe(made)) == []


def test_weights_that_take_several_calls_tell_of_their_scores_too() -> None:
    made = Steeper()
    made.supports = Supports(dtypes=("float64",))
    (found,) = findings(made, replace(WEIGHTS, dtype="float64", kv_lora_rank=16), describe(made))
    assert found.says == "scores are 1.25 times what they should be"


def test_slots_of_other_sequences_have_numbers_too() -> None:
    made = FirstTable()
    made.supports = Supports(dtypes=("float64",))
    (found,) = findings(made, replace(WEIGHTS, dtype="float64"), describe(made))
    assert (found.topic, found.says) == ("batch", "sequence 1 reads key 0 of sequence 0")


def test_keys_of_other_sequences_have_numbers_too() -> None:
    class Unbounded(TorchAbsorbed):
        supports = Supports(dtypes=("float64",))

        def packed_visible(self, cu_q: Any, cu_k: Any, causal: bool) -> Any:
            return torch.ones(int(cu_q[-1]), int(cu_k[-1]), dtype=torch.bool)

    (found,) = findings(Unbounded(), replace(PREFILL, dtype="float64"), describe(Unbounded()))
    assert (found.topic, found.says) == ("batch", "sequence 1 reads key 0 of sequence 0")


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


class WholeLayer(TorchAbsorbed):
    """A layer that hands out no stages."""

    def layer(self, weights: Any, config: Any) -> Any:
        made = super().layer(weights, config)
        made.trace = None  # type: ignore[method-assign]
        return made


class Turned(TorchAbsorbed):
    def layer_rope(self, x: Any, positions: Any, config: Any) -> Any:
        return super().layer_rope(x, positions + 1 if x.ndim == 3 else positions, config)


class Backward(TorchAbsorbed):
    def layer_rope(self, x: Any, positions: Any, config: Any) -> Any:
        return super().layer_rope(x, -positions, config)


class OtherEps(TorchAbsorbed):
    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return super().rms_norm(x, weight, 1e-2)


class Hotter(TorchAbsorbed):
    def softmax_scale(self, config: Any) -> float:
        return 1.5 * super().softmax_scale(config)


class HalfOutput(TorchAbsorbed):
    def project_output(self, out: Any, weights: Any, config: Any) -> Any:
        return super().project_output(out, weights, config) / 2


class LostRow(TorchAbsorbed):
    def layer_visible(self, q: Any, k: Any) -> Any:
        seen = super().layer_visible(q, k).clone()
        if q.shape[-2] < k.shape[-2]:
            seen[..., 0] = False
        return seen


LAYER = LayerCase(dtype="float64", batch=2, prompt=4, steps=1, num_heads=2, qk_rope_head_dim=4, q_lora_rank=4, start=3)


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        (Turned, ("rotation", "the first stage that is wrong is k_pe of prefill: it is rotated as at positions +1")),
        (Backward, ("rotation", "the first stage that is wrong is q_pe of prefill: it is rotated backwards")),
        (OtherEps, ("norm", "large tokens are right, so that it is the eps of a norm")),
        (Hotter, ("scores", "without queries the layer is right, so that it is the queries or the scores")),
        (
            HalfOutput,
            ("output", "the first stage that is wrong is o_proj of prefill: it is 0.5 times what it should be"),
        ),
        (LostRow, ("cache", "prefill of the same tokens is right, so that it is decode, or what is cached")),
    ],
)
def test_the_wrong_step_of_a_layer_is_seen(subject: type, told: tuple[str, str]) -> None:
    assert told in [(found.topic, found.says) for found in findings(subject(), LAYER, describe(subject()))]


@pytest.mark.parametrize(
    ("subject", "sentence"),
    [
        (Backward, "tokens at position 0 are right, so that it is the rotation, or a position"),
        (OtherEps, "large tokens are right, so that it is the eps of a norm"),
        (Hotter, "without queries the layer is right, so that it is the queries or the scores"),
    ],
)
def test_a_layer_without_stages_tells_by_the_steps_that_are_made_to_do_nothing(subject: type, sentence: str) -> None:
    made = type("Made", (subject, WholeLayer), {})()
    assert sentence in telltale(made, LAYER)
    assert not any("stage" in text for text in telltale(made, LAYER))


def test_a_right_layer_tells_nothing() -> None:
    assert telltale(TorchAbsorbed(), LAYER) == telltale(WholeLayer(), LAYER) == []
