"""Laws of ``decode`` whose block tables are out of the ordinary: pages that sequences share, and thousands of pages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs, decode_expected
from mla_spec.properties.attention import judge_attention
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.properties.test_decode_exact import LEAD
from mla_spec.reference.typing import Array
from mla_spec.subjects.supports import Supports

LONG = 65536 + 70
"""Keys of a long context, whose numbers do not fit 16 bits."""

TARGETS = (0, 4095, 4096, 32767, 32768, 65535, 65536, LONG - 1)


@law(needs=DECODE, cases=narrowed(decode_cases, min_batch=2), cost=2)
def test_decode_sequences_share_the_pages_of_a_prefix(run: Run, case: DecodeCase) -> None:
    """Sequences whose tables begin with the same pages, as after a prefix-cache hit, each read all of them."""
    inputs = case.build()
    table = inputs.block_table.copy()
    longest = int(inputs.cache_seqlens.argmax())
    for i, count in enumerate(case.pages_needed):
        shared = count - count // 3
        table[i, :shared] = table[longest, :shared]
    shared_inputs = replace(inputs, block_table=table)
    judge_attention(run, run.call(DECODE, shared_inputs), decode_expected(shared_inputs, run.profile))


def _long_cases(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """A long sequence and a short one in narrow rows, where the subject takes them."""
    c, r = (8, 4) if supports.latent_dims is None else min(supports.latent_dims)
    return [
        DecodeCase(
            dtype=profile.dtype,
            seqlens=(LONG, 5),
            num_heads=min(supports.num_heads or (2,)),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=min(supports.page_sizes or (16,), key=lambda size: abs(size - 16)),
            causal=supports.causal[0],
        )
    ]


def _with_leading_key(case: DecodeCase, token: int) -> tuple[DecodeInputs, Array]:
    """A key of the long sequence leads, in page 1 of a small pool whose others come again and again; and its value."""
    rng = np.random.default_rng([case.seed, 14])
    c, size = case.kv_lora_rank, case.page_size
    cache = np.zeros((4, size, 1, c + case.qk_rope_head_dim))
    cache[..., :c] = rng.integers(-8, 9, (4, size, 1, c))
    cache[..., c - 1] = 0.0
    cache[1, token % size, 0, c - 1] = 32.0
    table = rng.integers(2, 4, (2, max(case.pages_needed))).astype(np.int32)
    table[0, token // size] = 1
    q = np.zeros((2, 1, case.num_heads, cache.shape[-1]))
    q[..., c - 1] = LEAD / 32
    inputs = DecodeInputs(
        q=q,
        kv_cache=cache,
        block_table=table,
        cache_seqlens=np.array(case.seqlens, dtype=np.int32),
        head_dim_v=c,
        softmax_scale=1.0,
        causal=case.causal,
    )
    return inputs, cache[1, token % size, 0, :c]


@law(needs=DECODE, cases=_long_cases)
def test_decode_one_hot_in_a_long_context(run: Run, case: DecodeCase) -> None:
    """A key that leads among more than 2^16 gives exactly its value, wherever it is, beside a short sequence."""
    for token in TARGETS:
        inputs, value = _with_leading_key(case, token)
        out = run.call(DECODE, inputs)[0].value[0]  # [1, h, c]
        run.require(
            bool((out == value).all()),
            f"out of a sequence of {LONG} keys is not the value of key {token}, which has all the weight; "
            f"{int((out != value).sum())} of {out.size} elements differ",
        )
