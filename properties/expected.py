"""Exact results of cases and their bounds, from the reference."""

from __future__ import annotations

import numpy as np

from mla_spec.harness.cases import DecodeInputs
from mla_spec.harness.contract import Supports
from mla_spec.harness.driver import Result
from mla_spec.harness.laws import Run
from mla_spec.reference.bounds import BoundedAttention, InheritedError, attention_with_bound
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.profile import Profile
from mla_spec.reference.typing import Array


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


def declared_lse(lse: Array, supports: Supports) -> Array:
    """The exact LSE with the value that the subject declares for rows without keys."""
    return np.where(np.isneginf(lse), np.inf, lse) if supports.empty_row == "zero/+inf" else lse


def judge_decode(run: Run, got: tuple[Result, Result | None], want: BoundedAttention) -> None:
    """Judge out, and the LSE where the subject returns one, against the exact result."""
    run.within(got[0], want.out, want.out_error)
    if got[1] is not None:
        run.within(got[1], declared_lse(want.lse, run.supports), want.lse_error, gate=False)
