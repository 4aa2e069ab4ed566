"""Exact results of cases and their bounds, from the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, InheritedError, attention_with_bound
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.prefill import prefill_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.quantised_cache import error_bound
from mla_spec.judging.law import Run
from mla_spec.operations.all import DecodeInputs, PrefillInputs
from mla_spec.operations.quantised_cache import QuantisedDecodeInputs
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.cache_layout import CacheLayout
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports


def decode_expected(
    inputs: DecodeInputs, profile: Profile, inherited_q: Array | None = None, probable: bool = False
) -> BoundedAttention:
    """Exact decode and its bound; ``inherited_q`` is how far q may be from an exact one."""
    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)[:, :, None]  # [b, t, 1, c+r]
    values = rows[..., : inputs.head_dim_v]
    inherited = None
    if inherited_q is not None:
        inherited = InheritedError(inherited_q, 0 * rows, 0 * values)
    return attention_with_bound(
        inputs.q,
        rows,
        values,
        softmax_scale=inputs.softmax_scale,
        profile=profile,
        cache_seqlens=inputs.cache_seqlens,
        causal=inputs.causal,
        inherited=inherited,
        probable=probable,
    )


def prefill_expected(inputs: PrefillInputs, profile: Profile) -> BoundedAttention:
    """Exact prefill and its bound."""
    return prefill_with_bound(**vars(inputs), profile=profile)


def quantised_decode_expected(inputs: QuantisedDecodeInputs, profile: Profile) -> BoundedAttention:
    """Exact decode of the dequantised rows; unless declared otherwise they are rounded to the softmax's arithmetic."""
    rounded = profile.cache_dequantised or profile.softmax
    return decode_expected(inputs.exact, replace(profile, cache_dequantised=rounded))


def quantised_error(rows: Array, scales: Array, layout: CacheLayout) -> ErrorBound:
    """How far stored rows may be from those that were quantised, with the scales that were stored."""
    # What was stored with a scale NaN is NaN, and so outside any bound.
    scales = np.where(np.isnan(scales), 1.0, scales)
    with np.errstate(over="ignore", invalid="ignore"):
        return ErrorBound({"rounding to the nearest code": error_bound(rows, scales, layout)})


def dequantised_error(rows: Array, profile: Profile) -> ErrorBound:
    """How far rows that are read may be from code times scale: rounded in the arithmetic, and then to the dtype."""
    fmt = format_of(profile.dtype)
    rate = fmt.unit_roundoff + 2 * format_of(profile.softmax).unit_roundoff
    exact = round_to(rows, fmt.name) == rows
    error = np.where(exact, 0.0, rate * np.abs(rows) + fmt.smallest_subnormal / 2)
    return ErrorBound({f"rounding to {fmt.name}": error})


def declared_lse(lse: Array, supports: Supports) -> Array:
    """The exact LSE with the value that the subject declares for rows without keys."""
    return np.where(np.isneginf(lse), np.inf, lse) if supports.empty_row == "zero/+inf" else lse


def judge_attention(run: Run, got: tuple[Result, Result | None], want: BoundedAttention) -> None:
    """Judge out of decode or prefill, and the LSE where the subject returns one, against the exact result."""
    run.within(got[0], want.out, want.out_error)
    if got[1] is not None:
        run.within(got[1], declared_lse(want.lse, run.supports), want.lse_error, gate=False)
