"""Numbers that production has, and how large cases of them may be: what fixed cases of several operations share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.properties.strategies.sizes import cycled
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports

FEW = (5, 70, 128, 20, 97, 1, 37)
"""Lengths that come again and again in a large batch, a whole tile among them. None comes again after a power of two, and two of
more than a page of 64 lie every number of sequences apart but multiples of 7.
"""

FEW_OF_LARGE_PAGES = (5, 450, 257, 20, 512, 1, 37)
"""The same where pages have hundreds of tokens: nearly a whole one, and more than one."""

ELEMENTS = 2**22
"""Of the keys that all sequences of a case see, about; beyond that exact laws take over, which need no reference."""

LONG = (4161, 8193, 32769, 65606, 131142)
"""Keys of a long sequence: just beyond a power of two, but for what no kernel's part divides."""

BETWEEN = (
    *(256, 321, 383, 485, 512, 577, 703, 741, 768, 832, 959, 1000, 1024, 1025, 1216, 1407),
    *(1536, 1601, 1791, 1984, 2048, 2049, 2239, 2560, 2880, 3071, 3328, 3584, 3841, 4032, 4095, 4096),
)
"""Lengths of 4 to 64 tiles of 64 keys: tiles of every remainder by 2, 3, 4, 5 and 8, whole ones and not, and powers of two."""

ALIKE = ((16, 100), (128, 37))
"""How many sequences of one length, no whole number of pages, as a benchmark has them."""

SORTED = 40
"""Sequences whose lengths rise or fall, as a scheduler hands them on."""

AROUND = 100
"""Sequences among which one is long."""


HEADS = (24, 32, 48, 64, 96, 112, 128)
"""Heads of published models, and what tensor parallelism leaves of them; some are no whole number of tiles."""

LENGTHS = (5, 37, 20)
"""Of an ordinary batch."""

PADDED = (5, 37, 0, 1, 70, 20, 0)
"""Lengths of a batch that is padded with empty sequences, over and over."""


def shortened(lengths: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """Lengths so cut that all keys of a batch, of so many elements each, are no more than ``ELEMENTS``."""
    most = max(3, ELEMENTS // (len(lengths) * elements))
    return tuple(min(n, most) for n in lengths)


def thinned(lengths: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """Every n-th length, with n so large that all keys, of so many elements each, are about ``ELEMENTS`` at most."""
    return lengths[:: -(-sum(lengths) * elements // ELEMENTS) or 1]


def nearest(allowed: tuple[int, ...] | None, wanted: int) -> int:
    """``wanted``, or the nearest that is allowed."""
    return wanted if allowed is None else min(allowed, key=lambda n: abs(n - wanted))


def first_of(allowed: tuple[Any, ...] | None, default: Any) -> Any:
    """The first that is allowed, or ``default`` where anything is."""
    return allowed[0] if allowed else default


def ordinary_page_size(supports: Supports) -> int:
    """16, or the nearest that is allowed."""
    return nearest(supports.page_sizes, 16)


def takes_empty_rows(supports: Supports) -> bool:
    """Whether rows without keys may occur."""
    return supports.empty_row != "unsupported"


def room_for_pages(pages: int, elements: int) -> int:
    """How many pages all sequences share, where so many of so many elements each would be too large a pool; 0 where not."""
    room = max(ELEMENTS // 2 // elements, 64)
    return 0 if pages <= room else room


def latent_dims(supports: Supports) -> tuple[int, int]:
    """The narrowest rows of a cache."""
    return (6, 2) if supports.latent_dims is None else min(supports.latent_dims, key=sum)


def pages_of_a_large_pool(supports: Supports, most: int) -> int:
    """Tokens of a page, ``most`` or 1 where rows are wide, so that a pool of more than 2^16 pages is still small."""
    return nearest(supports.page_sizes, most if sum(latent_dims(supports)) <= 16 else 1)


def no_published_rows(supports: Supports) -> str:
    """Why no case has the rows of DeepSeek-V3, or ""."""
    dims = supports.latent_dims
    return "" if dims is None or (512, 64) in dims else "takes no rows of 512 + 64 elements"


def prefill_dims(supports: Supports) -> tuple[int, int]:
    """The narrowest rows of keys and values, V narrower than QK."""
    return (6, 4) if supports.prefill_dims is None else min(supports.prefill_dims, key=sum)


def arranged() -> Iterator[tuple[int, ...]]:
    """Lengths of many sequences in the orders for which kernels and schedulers have paths of their own."""
    for b, length in ALIKE:
        yield (length,) * b
    rising = tuple(range(5, 5 + SORTED))
    yield from (rising, rising[::-1])
    yield placed(LONG[0], tuple(cycled(list(FEW), AROUND)), 41)


def placed(long: int, short: tuple[int, ...], place: int) -> tuple[int, ...]:
    """A long sequence among short ones."""
    return (*short[:place], long, *short[place:])


def most_keys(profile: Profile) -> int:
    """Keys of a sequence whose bound still says something.

    Weights that are rounded after they are divided by their sum must be normal numbers, and rescaling by a rough exp in each
    tile must not move out by more than 0.04, as the judge refuses bounds of more than 0.05. Exact laws have longer sequences.
    """
    most = float(LONG[-1])
    if profile.row_sum == "normalised":
        most = min(most, 1 / format_of(profile.probabilities).smallest_normal)
    if profile.tile is not None:
        most = min(most, 0.04 * profile.tile / (profile.exp_error * format_of(profile.softmax).unit_roundoff))
    return int(most)


def long_lengths(elements: int, most: int) -> Iterator[tuple[int, int]]:
    """Long lengths at places 0 to 2 of a batch, where a key takes so many elements; each place, if they are not too long."""
    for i, long in enumerate(n for n in LONG if n * elements <= ELEMENTS and n <= most):
        yield from ((long, place) for place in (range(3) if long < 2**13 else (i % 3,)))
