"""Values from which the weight of each key is read: that with the number j has a 1 in column j of the values, and 0 elsewhere.

An output then is the row of weights that a query gives to all keys of the call, or slots of the cache. What is wrong with it says
more than an output does: keys without a weight, keys that should have none, the weights of another head, scores that are scaled by
another factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.judging.finding import Finding
from mla_spec.judging.judge import ratios
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs, decode_expected
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillCase, PrefillInputs, prefill_expected
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.description import Description
from mla_spec.subjects.driver import Driver, Result, Results

MOST_CALLS = 32
"""Each reads as many weights of a query as there are columns of values."""

MOST_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class Row:
    """The weights that one query of a sequence gives with one head.

    Attributes:
        place: (sequence, query, head).
        got, want, bound: [numbers]; ``want`` is 0 for what the query does not see.
        keys: [t], the numbers of the keys of its sequence.
        scores: [parts, t], what the latent part and the rope part add to the scaled scores; one part where they are not known apart.
        owner: of a number, the sequence and which of its keys it is; slots that hold no key are left out.
        columns: numbers that one call gives. Other calls have other values, and so a decode has other sums of weights.
    """

    place: tuple[int, int, int]
    got: Array
    want: Array
    bound: Array
    keys: IntArray
    scores: Array
    owner: Mapping[int, tuple[int, int]]
    columns: int

    @property
    def calls(self) -> IntArray:
        """Which call gave the weight of each key, [t]."""
        return self.keys // self.columns

    @property
    def wrong(self) -> bool:
        return not bool((np.abs(self.got - self.want) <= self.bound).all())

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.got).all())

    @property
    def lost(self) -> IntArray:
        """Which of its keys have no weight and should have one."""
        return np.flatnonzero((np.abs(self.got) <= self.bound)[self.keys] & (self.want > 4 * self.bound)[self.keys])

    @property
    def extra(self) -> IntArray:
        """Numbers that have a weight and should have none."""
        return np.flatnonzero((self.want == 0) & ~(np.abs(self.got) <= self.bound))


def decode_weights(driver: Driver, case: DecodeCase, declared: Description) -> list[Finding]:
    """Findings on the weights of a decode, and on its values and LSE where the weights are right."""
    inputs, profile = case.build(), declared.profile(case.dtype)
    c, page_size = case.kv_lora_rank, case.page_size
    slots = inputs.kv_cache.shape[0] * page_size
    if case.shared_pages or _too_large(slots, c, len(case.seqlens) * case.s * case.num_heads):
        return []
    keys = [
        inputs.block_table[i, (t := np.arange(n)) // page_size] * page_size + t % page_size
        for i, n in enumerate(case.seqlens)
    ]
    asked = [_numbered_slots(inputs, first) for first in range(0, slots, c)]
    got, want, bound = _read([(driver.call(DECODE, each), decode_expected(each, profile)) for each in asked])
    owner = _owners(keys)
    rows = [
        Row(
            (i, s, h),
            got[i, s, h, :slots],
            want[i, s, h, :slots],
            bound[i, s, h, :slots],
            keys[i],
            _parts(asked, (i, s, h), keys[i]),
            owner,
            c,
        )
        for i, s, h in np.ndindex(len(case.seqlens), case.s, case.num_heads)
        if len(keys[i])
    ]
    if any(row.wrong for row in rows):
        return _findings(rows)
    return _beside_the_weights(driver.call(DECODE, inputs), decode_expected(inputs, profile))


def _too_large(numbers: int, columns: int, rows: int) -> bool:
    return not 0 < numbers <= columns * MOST_CALLS or rows * numbers > MOST_WEIGHTS


def _numbered_slots(inputs: DecodeInputs, first: int) -> DecodeInputs:
    """The inputs whose latents number the slots from ``first`` on."""
    cache, c = inputs.kv_cache.copy(), inputs.head_dim_v
    rows = cache.reshape(-1, cache.shape[-1])
    rows[:, :c] = 0
    numbered = np.arange(first, min(first + c, len(rows)))
    rows[numbered, numbered - first] = 1
    return replace(inputs, kv_cache=cache)


def _read(calls: list[tuple[Results, BoundedAttention]]) -> tuple[Array, Array, Array]:
    """(got, want, bound) of all columns of all calls."""
    got = [results.out.value for results, _ in calls]
    want = [exact.out for _, exact in calls]
    bound = [np.broadcast_to(exact.out_error.total, exact.out.shape) for _, exact in calls]
    return np.concatenate(got, axis=-1), np.concatenate(want, axis=-1), np.concatenate(bound, axis=-1)


def _owners(keys: list[IntArray]) -> dict[int, tuple[int, int]]:
    return {int(number): (i, t) for i, own in enumerate(keys) for t, number in enumerate(own)}


def _parts(asked: list[DecodeInputs], place: tuple[int, int, int], keys: IntArray) -> Array:
    """What the latent part and the rope part add to the scores of a query, [2, t], each in the call that has its weight."""
    c, scores = asked[0].head_dim_v, np.zeros((2, len(keys)))
    for number, inputs in enumerate(asked):
        use = keys // c == number
        q, rows = (
            inputs.softmax_scale * inputs.q[place],
            inputs.kv_cache.reshape(-1, inputs.kv_cache.shape[-1])[keys[use]],
        )
        scores[:, use] = rows[:, :c] @ q[:c], rows[:, c:] @ q[c:]
    return scores


def prefill_weights(driver: Driver, case: PrefillCase, declared: Description) -> list[Finding]:
    """The same of a prefill."""
    inputs, profile, total = case.build(), declared.profile(case.dtype), sum(case.seqlens_k)
    if _too_large(total, case.v_head_dim, sum(case.seqlens_q) * case.num_heads):
        return []
    keys = [np.arange(*span) for span in pairwise(inputs.cu_seqlens_k.tolist())]
    asked = [_numbered_values(inputs, first) for first in range(0, total, case.v_head_dim)]
    got, want, bound = _read([(driver.call(PREFILL, each), prefill_expected(each, profile)) for each in asked])
    owner, rows = _owners(keys), []
    for i, (start, stop) in enumerate(pairwise(inputs.cu_seqlens_q.tolist())):
        for s, h in np.ndindex(stop - start, case.num_heads if len(keys[i]) else 0):
            scores = inputs.softmax_scale * inputs.k[keys[i], h] @ inputs.q[start + s, h]
            at = start + s, h, slice(total)
            rows.append(Row((i, s, h), got[at], want[at], bound[at], keys[i], scores[None], owner, case.v_head_dim))
    if any(row.wrong for row in rows):
        return _findings(rows)
    return _beside_the_weights(driver.call(PREFILL, inputs), prefill_expected(inputs, profile))


def _numbered_values(inputs: PrefillInputs, first: int) -> PrefillInputs:
    v = np.zeros_like(inputs.v)
    numbered = np.arange(first, min(first + v.shape[-1], len(v)))
    v[numbered, :, numbered - first] = 1
    return replace(inputs, v=v)


def _beside_the_weights(got: Results, want: BoundedAttention) -> list[Finding]:
    """What is wrong where every weight is right."""
    if not _within(got.out, want.out, want.out_error):
        return [
            Finding(
                "values",
                "where values are 0 and 1 every weight is right: wrong is what weights multiply, or how products are summed",
            )
        ]
    if got.lse is not None and not _within(got.lse, want.lse, want.lse_error):
        return [Finding("lse", "the weight of every key is right, and so is out: the LSE alone is wrong")]
    return []


def _within(got: Result, want: Array, bound: ErrorBound) -> bool:
    return bool((ratios(got, want, np.broadcast_to(bound.total, want.shape)) <= 1).all())


def _findings(rows: list[Row]) -> list[Finding]:
    """The first way of looking at the wrong rows that explains half of them."""
    wrong = [row for row in rows if row.wrong]
    for look in (_offset, _of_another, _read_elsewhere, _masked, _shifted, _scaled, _unnormalized, _in_parts):
        found = Counter(finding for row in wrong for finding in look(row, rows)[:1])
        if sum(found.values()) * 2 >= len(wrong):
            return [finding for finding, _ in found.most_common(1)]
    return []


def _offset(row: Row, rows: list[Row]) -> list[Finding]:
    """Whether something was added to every column."""
    added = row.got - row.want
    if len(added) < 3 or not row.finite or not _close(added, np.full_like(added, np.median(added)), row.bound):
        return []
    return [Finding("values", "out is off by one amount everywhere, whatever the weights and the values are")]


def _of_another(row: Row, rows: list[Row]) -> list[Finding]:
    """Whether these are the weights of another head or query of the sequence."""
    for axis, (name, topic) in ((2, ("head", "heads")), (1, ("query", "mask"))):
        for other in rows:
            apart = [i for i in range(3) if other.place[i] != row.place[i]]
            if apart == [axis] and len(row.keys) > 1 and _close(row.got, other.want, other.bound):
                return [Finding(topic, f"{name} {row.place[axis]} has the weights of {name} {other.place[axis]}")]
    return []


def _close(got: Array, want: Array, bound: Array) -> bool:
    return bool((np.abs(got - want) <= 2 * bound).all())


def _read_elsewhere(row: Row, rows: list[Row]) -> list[Finding]:
    """Whether what is weighed is no key of the sequence."""
    elsewhere = [int(number) for number in row.extra if int(number) not in row.keys] if row.finite else []
    if not elsewhere:
        return []
    owned = [row.owner[number] for number in elsewhere if number in row.owner]
    if not owned:
        return [Finding("reads", f"sequence {row.place[0]} reads a slot that holds none of its keys")]
    sequence, key = min(owned)
    return [Finding("batch", f"sequence {row.place[0]} reads key {key} of sequence {sequence}")]


def _masked(row: Row, rows: list[Row]) -> list[Finding]:
    """Which keys are not seen that should be, or the reverse."""
    if not row.finite:
        return []
    where = f"query {row.place[1]} of sequence {row.place[0]}"
    if len(row.extra):
        first = min(row.owner[int(number)][1] for number in row.extra)
        return [Finding("mask", f"{where} sees key {first}, which it should not")]
    lost, seen = row.lost, np.flatnonzero(row.want[row.keys])
    if not len(lost):
        return []
    if len(lost) == len(seen):
        return [Finding("reads", f"{where} sees none of its keys")]
    if len(lost) == 1 and lost[0] == seen[-1]:
        return [Finding("mask", "the last key of a query is not seen")]
    if len(lost) == 1 and lost[0] == seen[0]:
        return [Finding("mask", "the first key is not seen")]
    if (lost >= seen[-1] - len(lost) + 1).all():
        return [Finding("mask", f"{where} sees its first {len(seen) - len(lost)} keys only, of {len(seen)}")]
    return [Finding("reads", f"{where} does not see key {lost[0]}, and {len(lost)} of {len(seen)} keys alike")]


def _shifted(row: Row, rows: list[Row]) -> list[Finding]:
    """Whether the weights are the right ones, of other keys."""
    got, want, bound = row.got[row.keys], row.want[row.keys], row.bound[row.keys]
    if len(got) < 3 or not row.finite:
        return []
    if _close(got[1:], want[:-1], bound[:-1]) or _close(got[:-1], want[1:], bound[1:]):
        return [Finding("reads", "each key has the weight of the one beside it")]
    order = np.argsort(want)
    same = _close(np.sort(got), want[order], bound[order])
    return [Finding("reads", "keys have the weights of others")] if same else []


def _scaled(row: Row, rows: list[Row]) -> list[Finding]:
    """Whether the weights are those of scores whose parts have other factors."""
    got, want, bound = row.got[row.keys], row.want[row.keys], row.bound[row.keys]
    use = (want > 8 * bound) & (got > 8 * bound)
    parts = [part[use] for part in row.scores if use.any() and np.ptp(part[use]) > 0]
    calls = [(row.calls == number)[use].astype(float) for number in np.unique(row.calls[use])]  # each with its own sum
    if not parts or use.sum() <= len(calls) + len(parts) or not row.finite:
        return []
    logs = np.log(got[use])
    design = np.stack([*parts, *calls], axis=1)
    factors, *_ = np.linalg.lstsq(design, logs, rcond=None)
    slack = 4 * float((bound[use] / got[use]).max()) + 1e3 * np.finfo(float).eps * (1 + np.abs(logs).max())
    if not (np.abs(design @ factors - logs) <= slack).all():
        return []
    return _factors([round(float(factor), 2) + 0.0 for factor in factors[: len(parts)]], len(parts) == len(row.scores))


def _factors(factors: list[float], apart: bool) -> list[Finding]:
    if all(factor == 1 for factor in factors):
        return []
    if len(set(factors)) == 1:
        text = f"scores are {factors[0]:g} times what they should be" if factors[0] else "all keys have one score"
        return [Finding("scores", text)]
    left = [name for name, factor in zip(("latent", "rope"), factors, strict=False) if apart and factor == 0]
    if left:
        return [Finding("scores", f"the {left[0]} part of the scores is left out")]
    return [
        Finding("scores", f"the latent part of the scores has the factor {factors[0]:g}, the rope part {factors[-1]:g}")
    ]


def _unnormalized(row: Row, rows: list[Row]) -> list[Finding]:
    """Whether the weights have one factor too many."""
    factor = float((row.got * row.want).sum() / (row.want * row.want).sum())
    if not row.finite or not _close(row.got, factor * row.want, abs(factor) * row.bound):
        return []
    return [Finding("softmax", f"weights are {factor:.3g} times what they should be")]


def _in_parts(row: Row, rows: list[Row]) -> list[Finding]:
    """Whether the weights are right within runs of keys, and wrong between these; else those of single keys are."""
    if not row.finite:
        return [Finding("softmax", "weights are not finite")]
    got, want, bound = row.got[row.keys], row.want[row.keys], row.bound[row.keys]
    most = np.bincount(row.calls).argmax()
    use = np.flatnonzero((want > 8 * bound) & (row.calls == most))
    if len(use) < 4 or abs(row.got.sum() - row.want.sum()) > 2 * row.bound.sum():
        return []
    ratio = got[use] / want[use]
    slack = 4 * float((bound[use] / want[use]).max()) + 1e3 * np.finfo(float).eps
    breaks = np.flatnonzero(np.abs(np.diff(ratio)) > slack * np.abs(ratio[:-1])) + 1
    if 0 < len(breaks) <= len(use) // 4:
        return [
            Finding("softmax", f"weights of the keys from {use[breaks[0]]} on have another factor than those before")
        ]
    return [Finding("scores", "single keys have wrong weights: their scores are wrong")]
