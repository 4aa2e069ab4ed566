"""Sizes for which ``mla-spec map`` says what a subject does with an operation, as data of the operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mla_spec.subjects.supports import Supports

Sizes = Mapping[str, int]
"""A value of each axis, by name."""


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """Three axes of sizes, and classes of cases beside them.

    Attributes:
        law: that judges; it takes the operation's cases.
        kind: what the classes are, in one word.
        classes: their names; each has its own box of sizes.
        axes: of each axis the name, as in "64 heads", and its values, the smallest first.
        fields: from what the subject supports, a class and sizes, the fields of a case but for dtype and seed.
        declared: whether the subject declares to take such a case; dtypes are looked at elsewhere.
    """

    law: str
    kind: str
    classes: tuple[str, ...]
    axes: Mapping[str, tuple[int, ...]]
    fields: Callable[[Supports, str, Sizes], dict[str, Any]]
    declared: Callable[[Supports, str, Sizes], bool]

    def __post_init__(self) -> None:
        assert len(self.axes) == 3, "a page has rows, and pairs of two axes as columns"
        assert all(values == tuple(sorted(values)) for values in self.axes.values())


HEADS = (1, 2, 3, 8, 16, 24, 32, 64, 128)

PAGED_AXES: Mapping[str, tuple[int, ...]] = {
    "heads": HEADS,
    "queries": (1, 2, 3, 4, 8),
    "page": (1, 2, 16, 32, 64, 128),
}
"""Of attention over pages: heads, queries of a sequence, tokens of a page."""

LENGTHS: Mapping[str, Callable[[int], tuple[int, ...]]] = {
    "one key": lambda page: (1,),
    "a whole page": lambda page: (page,),
    "a key beyond a page": lambda page: (page + 1,),
    "ragged, several pages": lambda page: (3 * page + 5, 1, page, 2 * page - 1),
    "a thousand keys": lambda page: (1025,),
}
"""Classes of lengths: from a page size, how many keys each sequence has."""


def lengths(name: str, sizes: Sizes) -> tuple[int, ...]:
    """How many keys each sequence of a class has: no fewer than queries."""
    return tuple(max(n, sizes["queries"]) for n in LENGTHS[name](sizes["page"]))


def latent_dims(supports: Supports) -> dict[str, int]:
    """The widths of a latent cache that a subject takes, those of published models where it leaves the choice."""
    latent, rope = (supports.latent_dims or ((512, 64),))[0]
    return {"kv_lora_rank": latent, "qk_rope_head_dim": rope}


def takes_pages(supports: Supports, sizes: Sizes) -> bool:
    """Whether a subject declares to take such heads, queries and pages."""
    known = [(sizes["heads"], supports.num_heads), (sizes["page"], supports.page_sizes)]
    return all(values is None or size in values for size, values in known) and sizes["queries"] <= (
        supports.max_s or sizes["queries"]
    )
