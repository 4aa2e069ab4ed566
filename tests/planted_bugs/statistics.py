"""Faults that stay within the worst-case bound of every output, and show over many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.planted_bugs.registry import planted
from mla_spec.proof.emulated import EmulatedKernel, Schedule

FLASH = EmulatedKernel().profile


def _narrow(**changes: Any) -> dict[str, Profile]:
    """The default profiles, with changes where P is narrower than float32."""
    return {
        dtype: profile if profile.probabilities == "float32" else replace(profile, **changes)
        for dtype, profile in FLASH.items()
    }


@planted(
    "X50",
    symptom="the model's activations shrink a little in every layer",
    shows_when="16-bit outputs",
    killed_by=("test_decode_output_is_unbiased",),
)
class TruncatesOutput(EmulatedKernel):
    """The output is cut off to its format, where rounding to nearest is declared."""

    def __init__(self) -> None:
        super().__init__(_narrow(output_rounding="truncate"), declared=FLASH)


@planted(
    "X51",
    symptom="outputs are too small by a fraction of a percent",
    shows_when="P narrower than float32, and the row sum of unrounded weights",
    killed_by=("test_decode_output_is_unbiased", "test_decode_roundings_do_not_add_up"),
)
class TruncatesP(EmulatedKernel):
    """P is cut off to its format, as by dropping the lower half of a float32 register."""

    def __init__(self) -> None:
        super().__init__(schedule=Schedule(truncate_probabilities=True))


@planted(
    "X52",
    symptom="outputs are noisier than they need be, the more the longer the sequence",
    shows_when="many keys",
    killed_by=("test_decode_error_is_as_small_as_declared",),
)
class AccumulatesInBfloat16(EmulatedKernel):
    """P·V is summed in bfloat16."""

    def __init__(self) -> None:
        super().__init__(_narrow(value=Accumulator(format="bfloat16", order="blocked", block=64)), declared=FLASH)


@planted(
    "X53",
    symptom="outputs are noisier than they need be",
    shows_when="always, where P narrower than float32 is declared at all",
    killed_by=("test_decode_error_is_as_small_as_declared",),
)
class RoundsPToFloat8(EmulatedKernel):
    """P is rounded to float8 before P·V, where the tensors' 16-bit format is declared."""

    def __init__(self) -> None:
        super().__init__(_narrow(probabilities="float8_e4m3fn"), declared=FLASH)


class Bfloat16(EmulatedKernel):
    """Correct, for bfloat16 only, and without an LSE."""

    name = "emulated-bfloat16"

    def __init__(self) -> None:
        super().__init__({"bfloat16": FLASH["bfloat16"]}, lse=False)


@planted(
    "X54",
    symptom="probabilities are a little too flat",
    shows_when="many rows",
    killed_by=("test_decode_output_is_unbiased",),
)
class ShortLog2e(Bfloat16):
    """log₂ e is written as 1.442, which makes softmax_scale 0.05 % too small."""

    def decode(self, *tensors: Tensor, softmax_scale: float, **options: Any) -> tuple[Tensor, Tensor]:
        log2_e = 1.4426950408889634
        return super().decode(*tensors, softmax_scale=softmax_scale * 1.442 / log2_e, **options)


@planted(
    "X55",
    symptom="the newest token is forgotten in long conversations",
    shows_when="more than 2048 keys",
    killed_by=("test_decode_lse_is_unbiased",),
)
class LosesLastKeyOfLongSequence(EmulatedKernel):
    """Beyond 2048 keys another kernel runs, whose loop ends one key too early."""

    def decode(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return super().decode(q, kv_cache, block_table, cache_seqlens - (cache_seqlens > 2048).int(), **options)


@planted(
    "X56",
    symptom="one head is slightly too quiet",
    shows_when="at least four heads, and many rows of each",
    killed_by=("test_decode_output_is_unbiased",),
)
class TruncatesPOfOneHead(EmulatedKernel):
    """P of head 3 is cut off to its format."""

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().decode(*args, **options)
        truncated, _ = TruncatesP().decode(*args, **options)
        return torch.cat([out[:, :, :3], truncated[:, :, 3:4], out[:, :, 4:]], dim=2), lse


class MergesParts(EmulatedKernel):
    """Correct: every 128 keys are merged with the running result by their LSE, in float32."""

    name = "emulated-merging"
    split_format = "float32"

    def __init__(self) -> None:
        honest = {dtype: replace(profile, merge_every=128) for dtype, profile in FLASH.items()}
        stored = {dtype: replace(profile, split_format=self.split_format) for dtype, profile in honest.items()}
        super().__init__(stored, declared=honest)


@planted(
    "X58",
    symptom="outputs are noisier the longer the sequence",
    shows_when="many parts, in bfloat16",
    killed_by=("test_decode_error_is_as_small_as_declared",),
)
class StoresPartsInBfloat16(MergesParts):
    """The running result is kept in bfloat16 between the parts."""

    split_format = "bfloat16"


class RowSumOfRounded(EmulatedKernel):
    """Correct: the row sum adds the weights as they multiply V, which it declares."""

    name = "emulated-row-sum-of-rounded"
    schedule = Schedule()

    def __init__(self) -> None:
        super().__init__(_narrow(row_sum="rounded"), self.schedule)


@planted(
    "X57",
    symptom="parts merged by their LSEs do not give the whole, which looks right itself",
    shows_when="P narrower than float32, and scores that differ",
    killed_by=("test_decode_lse_is_unbiased",),
)
class SumsTruncatedP(RowSumOfRounded):
    """P is cut off to its format, and so is the row sum: the output hides it, the LSE does not."""

    schedule = Schedule(truncate_probabilities=True)
