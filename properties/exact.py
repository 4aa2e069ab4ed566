"""Attention with one right answer at any length.

Scores are 0 or ``LEAD`` below, so that every weight is 0 or the same as the others, and values are small integers. Where as
many keys as a power of two have weight, the mean of their values is exact in every format, order and tile; merges by LSE, whose
exponentials round, and LSEs have a bound. Neither needs the keys in a reference's full width, so that a case costs what the
subject takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array, BoolArray, IntArray

LEAD = 1024.0
"""By how much a key with weight leads: exp(-1024) is 0 in float64 and in anything narrower."""

LOSING = -4.0
"""The one element by which keys without weight differ; those with weight have 0, and so have all others."""

QUERY = -LEAD / LOSING
"""The one element of every query that is not 0."""

VALUES = (-3, -2, -1, 0, 1, 2, 3, 4)
"""Numbers that the narrowest format of a cache holds."""

PERIOD = 251
"""Keys after which values come again: a prime, so that no page, tile or part has the same as the next."""


@dataclass(frozen=True)
class Pattern:
    """Which of a sequence's keys have weight.

    Attributes:
        what: for messages.
        leads: [t].
        group: 0 or 1 for each key, [t]; the two have other values.
    """

    what: str
    leads: BoolArray
    group: IntArray


def patterns(length: int, seen: int, *, all_places: bool, turn: int = 0) -> list[Pattern]:
    """One key that has all the weight; as many equal ones as a power of two; two groups, one three times the other.

    Args:
        length: keys of the sequence.
        seen: keys that all queries see; none beyond has weight.
        all_places: whether a key leads at every place in turn, or at one that ``turn`` says.
    """
    token = np.arange(length)
    zero = np.zeros(length, dtype=int)
    edges = (256, 512, 1024, 2048, 4096, 32768, 65536)
    places = sorted(
        {0, seen // 3, seen // 2, seen - 1, *(e for e in edges if e < seen), *(e - 1 for e in edges if e <= seen)}
    )
    chosen = places if all_places else [places[(5 * turn + 3) % len(places)]]
    made = [Pattern(f"key {place} has all the weight", token == place, zero) for place in chosen]
    count = 2 ** int(np.log2(seen))
    for start in sorted({0, seen - count}) if all_places else [seen - count]:
        inside = (token >= start) & (token < start + count)
        made.append(Pattern(f"keys {start} .. {start + count - 1} have equal weight", inside, zero))
    fourth = count // 4
    if fourth:
        heavy = (token >= seen - 3 * fourth) & (token < seen)
        what = f"the first {fourth} keys and the last {3 * fourth} have equal weight"
        made.append(Pattern(what, (token < fourth) | heavy, heavy.astype(int)))
    return made


BLOCK = 2**14
"""Keys of a block. One query with one value a key is so small that blocks of fewer keys cost more in calls than in arithmetic."""


def value_table(width: int, seed: int) -> Array:
    """Values [2, PERIOD, width] of the keys of both groups: small integers."""
    narrow = np.random.default_rng([seed, 31]).choice(VALUES, (2, PERIOD, min(width, 16))).astype(float)
    return narrow[..., np.arange(width) % narrow.shape[-1]]


@dataclass(frozen=True)
class Answer:
    """What attention over a pattern gives to every query that sees all keys with weight.

    Attributes:
        out: [width].
        bounded: the same of one query with one value for each key, of which the LSE and the errors are used.
        what: which keys have weight.
    """

    out: Array
    bounded: BoundedAttention
    what: str

    @classmethod
    def of(cls, pattern: Pattern, table: Array, place: IntArray, profile: Profile) -> Answer:
        """The answer where key t has the value table[group[t], place[t]]."""
        weight = np.zeros(table.shape[:2])
        np.add.at(weight, (pattern.group, place), pattern.leads)
        k = np.where(pattern.leads, 0.0, LOSING)[:, None, None]  # [t, 1, 1]
        widest = np.abs(table).max() + 0 * k
        bounded = attention_with_bound(
            np.full((1, 1, 1), QUERY), k, widest, softmax_scale=1.0, profile=profile, block_size=BLOCK
        )
        out = np.einsum("gp,gpc->c", weight, table) / weight.sum()
        return cls(out, bounded, pattern.what)

    def judge(self, run: Run, out: Array, lse: Array | None) -> None:
        """Out [..., width] and LSE of queries that see all keys with weight."""
        profile = run.profile
        run.compares(out.size)
        exact = profile.merges(1) == 0 and profile.averages_exactly
        # Weights of losing keys may be the smallest normal number instead of 0.
        losers = 2.0**24 * format_of(profile.softmax).smallest_normal
        error = losers if exact else 2 * float(self.bounded.out_error.total.max())
        want = round_to(self.out, profile.output)
        wrong = ~(np.abs(out - want) <= error)
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            run.require(
                False,
                f"out{list(index)}: got {float(out[index])!r}, want {'exactly ' * exact}{float(want[index[-1]])!r}, since "
                f"{self.what}; {int(wrong.sum())} of {wrong.size} elements differ",
            )
        if lse is not None:
            (score,), (bound,) = self.bounded.lse[0], self.bounded.lse_error.total[0]
            off = ~(np.abs(lse - score) <= bound)
            run.require(
                not off.any(),
                f"LSE: got {lse[off][:1]}, want {float(score)!r} within {float(bound):.3g}, since {self.what}",
            )


@dataclass(frozen=True)
class Keys:
    """The keys of a sequence: rows of a table of all that occur.

    Attributes:
        pattern: which have weight.
        place: where the value of each stands in the table of values, [t].
    """

    pattern: Pattern
    place: IntArray

    @property
    def code(self) -> IntArray:
        """The number of each key's row, [t]."""
        code: IntArray = (self.pattern.leads + 2 * self.pattern.group) * PERIOD + self.place
        return code


def rows_of(table: Array, width: int, channel: int) -> Array:
    """All rows that occur, [4 · PERIOD, width]: values, and in ``channel`` what decides the score."""
    rows = np.zeros((4 * PERIOD, width))
    for code in range(4):
        part = rows[code * PERIOD : (code + 1) * PERIOD]
        part[:, : table.shape[-1]] = table[code // 2]
        part[:, channel] = 0.0 if code % 2 else LOSING
    return rows


def rounds(lengths: tuple[int, ...], seen: tuple[int, ...], *, seed: int) -> Iterator[list[Pattern]]:
    """Patterns of all sequences of a batch, until each has had all of its own; a sequence without keys has none.

    With seed 0 a key leads at every place in turn, with others at one.
    """
    each = [
        patterns(n, k, all_places=seed == 0, turn=seed)
        if k > 0
        else [Pattern("no key", np.zeros(n, dtype=bool), np.zeros(n, dtype=int))]
        for n, k in zip(lengths, seen, strict=True)
    ]
    for i in range(max(map(len, each))):
        yield [own[i % len(own)] for own in each]
