"""Laws of weight absorption."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.judging.law import Run, law
from mla_spec.operations.absorb import OPERATION as ABSORB
from mla_spec.operations.absorb import AbsorbInputs
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, decode_expected
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.mla import absorb, explicit
from mla_spec.subjects.driver import computed


@law(needs=ABSORB, cases=decode_cases)
def test_absorb_splits_kv_b_proj(run: Run, case: DecodeCase) -> None:
    """w_uk and w_uv are the key and the value rows of each head, bit for bit."""
    inputs = ABSORB.build(case)
    run.agrees(ABSORB, inputs, run.call(ABSORB, inputs))


@law(needs=(ABSORB, DECODE), cases=narrowed(decode_cases, logit_stds=(1.0, 4.0, 0.1)))
def test_absorbed_equals_explicit(run: Run, case: DecodeCase) -> None:
    """Folding w_uk into q, decoding over the latent and unfolding w_uv gives multi-head attention over expanded K and V."""
    inputs = case.build()
    kv_b_proj, config, q_nope = case.latent_weights()
    w_uk, w_uv = (result.value for result in run.call(ABSORB, AbsorbInputs(kv_b_proj, config)))
    q_pe = inputs.q[..., case.kv_lora_rank :]
    folded = np.einsum("bshn,hnc->bshc", q_nope, w_uk)  # [b, s, h, c]
    stored = np.concatenate([round_to(folded, case.dtype), q_pe], axis=-1)
    exact_q = np.concatenate([folded, q_pe], axis=-1)
    out = run.call(DECODE, replace(inputs, q=stored))[0].value  # [b, s, h, c]
    got = np.einsum("bshc,hvc->bshv", out, w_uv)

    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    want, _ = explicit(
        q_nope,
        q_pe,
        rows[..., : case.kv_lora_rank],
        rows[..., case.kv_lora_rank :],
        *absorb(kv_b_proj, config),
        softmax_scale=inputs.softmax_scale,
        cache_seqlens=inputs.cache_seqlens,
        causal=inputs.causal,
    )
    fmt = format_of(case.dtype)
    lost = fmt.unit_roundoff * np.abs(exact_q) + fmt.smallest_subnormal
    lost[..., case.kv_lora_rank :] = 0.0
    bounded = decode_expected(replace(inputs, q=exact_q), run.profile, inherited_q=lost)
    bound = bounded.out_error.map(lambda term: np.einsum("bshc,hvc->bshv", term, np.abs(w_uv)))
    gauge = np.einsum("bshc,hvc->bshv", np.abs(bounded.out) + bounded.out_error.total, np.abs(w_uv))
    sums = 4 * (case.kv_lora_rank + case.qk_nope_head_dim) * format_of("float64").unit_roundoff * gauge
    run.within(computed(got, "out · w_uvᵀ"), want, bound.plus("float64 products of the law", sums), gate=False)
