"""Inputs that tell on themselves: every slot of the cache holds its own number, and every query asks for one of them.

A row of the cache is (g, g², 0, ...), where g is the number of its slot. With q = (2λa, -λ, 0, ...) its score is
λ(a² - (g - a)²), so that the key nearest to a has all the weight, and the first value of the output is the number of the slot
that was read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.judging.finding import Finding
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.description import Description
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import Supports

SHARPNESS = 64.0
"""λ: the next key has a weight of exp(-64)."""

MOST_SLOTS = 1024
"""Squares of larger numbers, times λ, are not exact enough in float32."""

MOST_CALLS = 64


@dataclass(frozen=True)
class Reading:
    """What a query asked for and what it got: (sequence, key), and the number of the slot; None where it is none."""

    sequence: int
    key: int
    slot: int | None


def pages_telltale(driver: Driver, case: DecodeCase, declared: Description) -> list[Finding]:
    """Findings on the keys, pages and sequences that a decode reads in place of others; the driver's dtype is float32."""
    inputs = _inputs(case, declared.supports)
    return [] if inputs is None else _findings(_wrong_readings(driver, inputs), inputs)


def _topic(way: str) -> str:
    return "softmax" if way.startswith("gets no single key") else "mask" if "last key" in way else "reads"


def _inputs(case: DecodeCase, supports: Supports) -> DecodeInputs | None:
    """Numbered slots in pages like those of the case; None where there are too many, or rows are too narrow."""
    made = DecodeCase(
        dtype="float32",
        seqlens=_lengths(case),
        num_heads=case.num_heads,
        kv_lora_rank=max(2, case.kv_lora_rank) if supports.latent_dims is None else case.kv_lora_rank,
        qk_rope_head_dim=case.qk_rope_head_dim,
        page_size=case.page_size,
        causal=False,
    )
    inputs = made.build()
    pages, page_size = inputs.kv_cache.shape[:2]
    if made.kv_lora_rank < 2 or False not in supports.causal or pages * page_size > MOST_SLOTS:
        return None
    number = np.arange(pages * page_size, dtype=float).reshape(pages, page_size, 1)
    cache = np.zeros_like(inputs.kv_cache)
    cache[..., 0], cache[..., 1] = number, number**2
    return replace(inputs, kv_cache=cache, softmax_scale=1.0)


def _lengths(case: DecodeCase) -> tuple[int, ...]:
    """Those of the case, with others where one or two sequences would show little."""
    more = (2 * case.page_size + 1, case.page_size + 1, 3 * case.page_size)
    return (*case.seqlens, *more[: max(0, len(more) - len(case.seqlens))])


def _wrong_readings(driver: Driver, inputs: DecodeInputs) -> list[Reading]:
    """Every key is asked for, by another head each, until all have been."""
    heads, lengths = inputs.q.shape[2], inputs.cache_seqlens
    wrong = []
    for first in range(0, min(int(lengths.max(initial=0)), heads * MOST_CALLS), heads):
        key = np.minimum(first + np.arange(heads), np.maximum(lengths[:, None] - 1, 0))  # [b, h]
        asked = _slots(inputs, key)
        got = driver.call(DECODE, replace(inputs, q=_queries(inputs, asked))).out.value[:, 0, :, 0]
        for i, h in np.argwhere(~(np.abs(got - asked) < 0.5) & (lengths[:, None] > 0)):
            slot = round(float(got[i, h])) if _is_number(got[i, h], inputs) else None
            wrong.append(Reading(int(i), int(key[i, h]), slot))
    return wrong


def _is_number(value: float, inputs: DecodeInputs) -> bool:
    pages, page_size = inputs.kv_cache.shape[:2]
    return bool(np.isfinite(value) and abs(value - round(value)) < 0.01 and 0 <= value < pages * page_size)


def _slots(inputs: DecodeInputs, key: IntArray) -> Array:
    """The number of the slot of each key [b, h]."""
    page_size = inputs.kv_cache.shape[1]
    pages = np.take_along_axis(inputs.block_table, key // page_size, axis=1)
    return np.asarray(pages * page_size + key % page_size, dtype=float)


def _queries(inputs: DecodeInputs, asked: Array) -> Array:
    q = np.zeros_like(inputs.q)
    q[:, 0, :, 0], q[:, 0, :, 1] = 2 * SHARPNESS * asked, -SHARPNESS
    return q


def _findings(wrong: list[Reading], inputs: DecodeInputs) -> list[Finding]:
    """The commonest ways in which readings are wrong, each with how often."""
    each = {(reading.sequence, reading.key): reading for reading in wrong}
    counts = Counter(_kind(reading, inputs) for reading in each.values())
    ways = Counter(way for _, way in counts)
    said: dict[str, str] = {}
    for (sequence, way), count in counts.most_common():
        several = f"{ways[way]} of {len(inputs.cache_seqlens)} sequences, such as {sequence}: {way}"
        one = f"sequence {sequence} {way} ({count} of its {int(inputs.cache_seqlens[sequence])} keys)"
        said.setdefault(way, one if ways[way] == 1 else several)
    return [Finding(_topic(way), text) for way, text in said.items()]


def _kind(reading: Reading, inputs: DecodeInputs) -> tuple[int, str]:
    """A sequence, and what it does in place of what it should."""
    return reading.sequence, _way(reading, inputs)


def _way(reading: Reading, inputs: DecodeInputs) -> str:
    page_size = inputs.kv_cache.shape[1]
    if reading.slot is None:
        return "gets no single key where it asks for one"
    page, offset = divmod(reading.slot, page_size)
    owners = [
        (sequence, column * page_size + offset)
        for sequence, table in enumerate(inputs.block_table)
        for column in np.flatnonzero(table[: -(-int(inputs.cache_seqlens[sequence]) // page_size)] == page)
    ]
    if not owners:
        return "reads a page of no sequence"
    sequence, key = owners[0]
    if sequence != reading.sequence:
        return f"reads the table row of sequence {sequence}"
    length = int(inputs.cache_seqlens[sequence])
    if key >= length:
        return "reads slots after its last key"
    if _is_next(reading, inputs):
        which = {length - 1: "its last key", 0: "its first key"}.get(reading.key, "some of its keys")
        return f"does not read {which}"
    if key % page_size == reading.key % page_size:
        return "reads another page of its table"
    return f"reads a key {abs(key - reading.key)} {'before' if key < reading.key else 'after'} the right one"


def _is_next(reading: Reading, inputs: DecodeInputs) -> bool:
    """Whether the slot that was read is the nearest to the right one: it has the weight where the right one is not read."""
    key = np.arange(int(inputs.cache_seqlens[reading.sequence]))
    only = replace(inputs, block_table=inputs.block_table[reading.sequence : reading.sequence + 1])
    slots = _slots(only, key[None])[0]
    distance = np.abs(slots - slots[reading.key])
    distance[reading.key] = np.inf
    return reading.slot is not None and bool(abs(reading.slot - slots[reading.key]) == distance.min())
