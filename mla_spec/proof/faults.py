"""Graded faults: a subject made slightly wrong, from the outside or in its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mla_spec.bounds.profile import Accumulator
from mla_spec.proof.emulated import EmulatedKernel, Schedule
from mla_spec.reference.formats import format_of
from mla_spec.subjects.contract import profile_of, supports_of
from mla_spec.subjects.description import Description, declared_by
from mla_spec.subjects.near import Handle, there

Grade = float | str
Decode = Callable[..., Any]

RELATIVE = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 3e-8, 1e-8)
LENGTHS = (64, 256, 1024, 4096)
SCALES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)
KEYS_LOST = (1024, 256, 64, 16, 4, 1)
SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: what is wrong, with {} for the grade.
        grades: how wrong, from the largest to the smallest fault.
        make: (subject, dtype, grade) -> the faulty subject; None where the grade is no fault of this subject.
        emulated: whether the fault is in the arithmetic of an emulated kernel that declares the subject's profile, rather
            than in the subject. ``make`` then gets what the subject declares in place of the subject.
        long: whether the grade is a length of sequences, which the cases must have.
    """

    name: str
    grades: tuple[Grade, ...]
    make: Callable[[Any, str, Any], Any]
    emulated: bool = False
    long: bool = False


class FaultySubject:
    """A subject whose ``decode`` is another function of its own ``decode`` and the arguments; it offers nothing else."""

    def __init__(self, subject: Any, decode: Decode) -> None:
        self.supports = supports_of(subject)
        self.profile = {dtype: profile_of(subject, dtype) for dtype in self.supports.dtypes}
        self.decode = decode


def injected(fault: Fault, subject: Any, dtype: str, grade: Grade) -> Any:
    """What ``fault.make`` gives, made where the subject is; a subject in a process of its own takes those of ``FAULTS``."""
    if fault.emulated:
        return fault.make(declared_by(subject), dtype, grade)
    if isinstance(subject, Handle):
        return there(_made_there, fault.name, subject, dtype, grade)
    return fault.make(subject, dtype, grade)


def _made_there(name: str, subject: Any, dtype: str, grade: Grade) -> Any:
    return next(fault for fault in FAULTS if fault.name == name).make(subject, dtype, grade)


def emulated_kernel(
    declared: Description, dtype: str, changes: dict[str, Any] | None = None, **schedule: Any
) -> EmulatedKernel:
    """An emulated kernel that declares the same profile for ``dtype`` and departs from it by ``changes``."""
    profile = declared.profile(dtype)
    return EmulatedKernel(
        {dtype: replace(profile, **(changes or {}))},
        Schedule(**schedule),
        declared={dtype: profile},
        lse=declared.supports.lse,
    )


def _scaled(subject: Any, dtype: str, error: float) -> Any:
    def decode(*tensors: Tensor, softmax_scale: float, **options: Any) -> Any:
        return subject.decode(*tensors, softmax_scale=softmax_scale * (1 + error), **options)

    return FaultySubject(subject, decode)


def _miscounted(keys: int) -> Callable[[Any, str, float], Any]:
    """Sequences of at least ``grade`` keys are taken for ``keys`` longer."""

    def make(subject: Any, dtype: str, shortest: float) -> Any:
        def decode(q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
            capacity = kv_cache.shape[1] * block_table.shape[1]
            wrong = torch.where(cache_seqlens >= shortest, cache_seqlens + keys, cache_seqlens).clamp(0, capacity)
            # The extra key's table entry may be no page at all; the fault is to read a key, not to crash.
            known = (block_table >= 0) & (block_table < kv_cache.shape[0])
            table = torch.where(known, block_table, torch.zeros_like(block_table))
            return subject.decode(q, kv_cache, table, wrong, **options)

        return FaultySubject(subject, decode)

    return make


def _from(shortest: int, make: Callable[[Any, str, Any], Any]) -> Callable[[Any, str, Any], Any]:
    """The fault in batches whose longest sequence has that many keys; others are right."""

    def made(subject: Any, dtype: str, grade: Any) -> Any:
        faulty = make(subject, dtype, grade)

        def decode(q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
            chosen = faulty if int(cache_seqlens.max()) >= shortest else subject
            return chosen.decode(q, kv_cache, block_table, cache_seqlens, **options)

        return FaultySubject(subject, decode)

    return made


def _keys_lost(shortest: int) -> Callable[[Any, str, Any], Any]:
    """Sequences of that many keys lose the last ``grade`` of them."""
    return lambda subject, dtype, keys: _miscounted(-int(keys))(subject, dtype, shortest)


def _rope_weakened(subject: Any, dtype: str, share: float) -> Any:
    def decode(q: Tensor, *tensors: Tensor, head_dim_v: int, **options: Any) -> Any:
        pe = (q[..., head_dim_v:].double() * (1 - share)).to(q.dtype)
        whole = torch.cat([q[..., :head_dim_v], pe], dim=-1)
        return subject.decode(whole, *tensors, head_dim_v=head_dim_v, **options)

    return FaultySubject(subject, decode)


def _rotated(subject: Any, dtype: str, positions: float) -> Any:
    def decode(q: Tensor, *tensors: Tensor, head_dim_v: int, **options: Any) -> Any:
        latent, pe = q[..., :head_dim_v], q[..., head_dim_v:].double()
        frequencies = 10000.0 ** -(torch.arange(0, pe.shape[-1], 2, device=q.device) / max(pe.shape[-1], 1)).double()
        cos, sin = (positions * frequencies).cos(), (positions * frequencies).sin()
        first, second = pe[..., 0::2], pe[..., 1::2]
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
        return subject.decode(
            torch.cat([latent, turned.to(q.dtype)], dim=-1), *tensors, head_dim_v=head_dim_v, **options
        )

    return FaultySubject(subject, decode)


def _output_scaled(subject: Any, dtype: str, error: float) -> Any:
    def decode(*tensors: Tensor, **options: Any) -> Any:
        out, lse = subject.decode(*tensors, **options)
        return (out.double() * (1 + error)).to(out.dtype), lse

    return FaultySubject(subject, decode)


def _lse_shifted(subject: Any, dtype: str, error: float) -> Any:
    if not supports_of(subject).lse:
        return None

    def decode(*tensors: Tensor, **options: Any) -> Any:
        out, lse = subject.decode(*tensors, **options)
        return out, lse + error

    return FaultySubject(subject, decode)


def _coarser(grade: str, declared: str) -> bool:
    return format_of(grade).unit_roundoff > format_of(declared).unit_roundoff


def _coarse_probabilities(declared: Description, dtype: str, grade: str) -> Any:
    if not _coarser(grade, declared.profile(dtype).probabilities):
        return None
    return emulated_kernel(declared, dtype, {"probabilities": grade})


def _coarse_accumulator(stage: str) -> Callable[[Description, str, str], Any]:
    def make(declared: Description, dtype: str, grade: str) -> Any:
        if not _coarser(grade, getattr(declared.profile(dtype), stage).format):
            return None
        return emulated_kernel(declared, dtype, {stage: Accumulator(format=grade)})

    return make


def _truncating_accumulator(stage: str) -> Callable[[Description, str, float], Any]:
    def make(declared: Description, dtype: str, grade: float) -> Any:
        tensor_core = Accumulator(order="tensor-core", block=16, fraction_bits=int(grade))
        granted = getattr(declared.profile(dtype), stage)
        # Only what errs more than declared is a fault; one step shows it, as every step errs alike.
        if tensor_core.relative_error(16) <= granted.relative_error(16):
            return None
        return emulated_kernel(declared, dtype, {stage: tensor_core})

    return make


def _truncated_probabilities(declared: Description, dtype: str, grade: str) -> Any:
    return emulated_kernel(declared, dtype, truncate_probabilities=True)


def _truncated_output(declared: Description, dtype: str, grade: str) -> Any:
    if declared.profile(dtype).output_rounding == "truncate":
        return None
    return emulated_kernel(declared, dtype, {"output_rounding": "truncate"})


def _at_length(keys: int) -> tuple[Fault, ...]:
    """Faults of long sequences alone, which laws must find by cases of their own and not by theirs made longer."""
    return (
        Fault(f"softmax scale too large by the factor 1 + {{}} from {keys} keys on", SCALES, _from(keys, _scaled)),
        Fault(f"{{}} keys lost from {keys} keys on", KEYS_LOST, _keys_lost(keys)),
        Fault(f"rope part too small by the factor 1 - {{}} from {keys} keys on", SHARES, _from(keys, _rope_weakened)),
    )


FORMATS = ("float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "float32")
FRACTION_BITS = (6, 8, 10, 12, 14, 16, 18, 20, 22)

FAULTS = (
    Fault("softmax scale too large by the factor 1 + {}", RELATIVE, _scaled),
    Fault("last key lost from {} keys on", LENGTHS, _miscounted(-1), long=True),
    Fault("one key too many from {} keys on", LENGTHS, _miscounted(1), long=True),
    Fault("rope off by {} positions", (1.0, 0.3, 0.1, 0.03, 0.01), _rotated),
    Fault("LSE too large by {}", RELATIVE, _lse_shifted),
    Fault("output too large by the factor 1 + {}", RELATIVE, _output_scaled),
    Fault("P in {}", FORMATS, _coarse_probabilities, emulated=True),
    Fault("q·k accumulated in {}", FORMATS[2:], _coarse_accumulator("score"), emulated=True),
    Fault("P·V accumulated in {}", FORMATS[2:], _coarse_accumulator("value"), emulated=True),
    Fault("q·k cut off at {} fraction bits", FRACTION_BITS, _truncating_accumulator("score"), emulated=True),
    Fault("P·V cut off at {} fraction bits", FRACTION_BITS, _truncating_accumulator("value"), emulated=True),
    Fault("P truncated", ("",), _truncated_probabilities, emulated=True),
    Fault("output truncated", ("",), _truncated_output, emulated=True),
    *_at_length(4096),
    *_at_length(32768),
)
"""All faults."""
