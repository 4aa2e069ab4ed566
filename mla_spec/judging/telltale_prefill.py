"""A prefill whose values are numbers: every query asks for one key, and what it gets says which token and head was read.

Keys are (g, g², 0, ...), where g is the number of the token, as the rows of ``mla_spec.judging.telltale_pages``. The first value of token g
and head h is g + tokens · h.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from mla_spec.judging.finding import Finding
from mla_spec.judging.telltale_pages import SHARPNESS
from mla_spec.operations.prefill import OPERATION, PrefillCase, PrefillInputs
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.description import Description
from mla_spec.subjects.driver import Driver

MOST_NUMBERS = 1024
"""Tokens times heads: squares of larger numbers, times the sharpness, are not exact enough in float32."""


def prefill_telltale(driver: Driver, case: PrefillCase, declared: Description) -> list[Finding]:
    """Findings on the keys that are read in place of others; the driver's dtype is float32."""
    lengths = (*case.seqlens_k, 5, 3)
    offsets_k = np.cumsum([0, *lengths]).astype(np.int32)
    offsets_q = np.cumsum([0, *range(1, len(lengths) + 1)]).astype(np.int32)
    h, total = case.num_heads, int(offsets_k[-1])
    if case.qk_head_dim < 2 or case.v_head_dim < 1 or False not in declared.supports.causal or h * total > MOST_NUMBERS:
        return []
    sequence = np.repeat(np.arange(len(lengths)), np.diff(offsets_q))  # of each query
    said: Counter[str] = Counter()
    for step in range(max(lengths)):
        asked = offsets_k[sequence] + np.minimum(step, np.maximum(np.take(lengths, sequence) - 1, 0))
        out = driver.call(OPERATION, _inputs(case, offsets_q, offsets_k, asked)).out.value[..., 0]
        want = asked[:, None] + total * np.arange(h)
        for i, head in np.argwhere(~(np.abs(out - want) < 0.5) & (np.take(lengths, sequence) > 0)[:, None]):
            said[_way(float(out[i, head]), int(asked[i]), int(head), int(sequence[i]), offsets_k, h)] += 1
    return [Finding(_topic(way), f"prefill {way} ({count} times)") for way, count in said.most_common(3)]


def _topic(way: str) -> str:
    words = {"another head": "heads", "another sequence": "batch", "no single key": "softmax", "the last key": "mask"}
    return next((topic for word, topic in words.items() if word in way), "reads")


def _inputs(case: PrefillCase, offsets_q: IntArray, offsets_k: IntArray, asked: IntArray) -> PrefillInputs:
    h, total = case.num_heads, int(offsets_k[-1])
    number = np.arange(total, dtype=float)
    q, k = np.zeros((len(asked), h, case.qk_head_dim)), np.zeros((total, h, case.qk_head_dim))
    v: Array = np.zeros((total, h, case.v_head_dim))
    q[..., 0], q[..., 1] = 2 * SHARPNESS * asked[:, None], -SHARPNESS
    k[..., 0], k[..., 1] = number[:, None], number[:, None] ** 2
    v[..., 0] = number[:, None] + total * np.arange(h)
    return PrefillInputs(q=q, k=k, v=v, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k, softmax_scale=1.0, causal=False)


def _way(got: float, asked: int, head: int, sequence: int, offsets_k: IntArray, heads: int) -> str:
    total = int(offsets_k[-1])
    if not np.isfinite(got) or abs(got - round(got)) > 0.01 or not 0 <= round(got) < total * heads:
        return "gets no single key where it asks for one"
    read_head, token = divmod(round(got), total)
    if read_head != head:
        return f"reads values of another head, such as {read_head} for {head}"
    owner = int(np.searchsorted(offsets_k, token, side="right")) - 1
    if owner != sequence:
        return f"reads keys of another sequence, such as {owner} for {sequence}"
    if asked == offsets_k[sequence + 1] - 1:
        return "does not read the last key of a sequence"
    if asked == offsets_k[sequence]:
        return "does not read the first key of a sequence"
    return f"reads a key {abs(token - asked)} {'before' if token < asked else 'after'} the right one"
