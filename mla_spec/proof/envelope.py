"""The envelope in which a decode is right: a lattice of sizes, bisected into what is right, refused and silently wrong.

Of each dtype and class of lengths, a box of heads, queries and page sizes is judged in its corners and its middle. Where these
are alike, so is the rest of the box, as far as anybody knows; where they differ, its longest side is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from mla_spec.judging.verdict import Record
from mla_spec.operations.decode import DecodeCase
from mla_spec.subjects.supports import Supports

LAW = "test_decode_agrees_with_reference"

HEADS = (1, 2, 3, 8, 16, 24, 32, 64, 128)
QUERIES = (1, 2, 3, 4, 8)
PAGES = (1, 2, 16, 32, 64, 128)

LENGTHS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "one key": lambda page: (1,),
    "a whole page": lambda page: (page,),
    "a key beyond a page": lambda page: (page + 1,),
    "ragged, several pages": lambda page: (3 * page + 5, 1, page, 2 * page - 1),
    "a thousand keys": lambda page: (1025,),
}
"""Classes of lengths: from a page size, how many keys each sequence has; at least as many as queries."""

Kind = Literal["right", "refuses", "wrong", "ends the process", "not judged"]

Sizes = tuple[int, int, int]
"""Heads, queries, tokens of a page."""

_Box = tuple[range, range, range]
"""Indices into the three axes."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a decode does with calls of one size.

    Attributes:
        kind: "right"; "refuses" by an exception; "wrong" without a word; "ends the process", or hangs; "not judged".
        measured: whether it was called; else it is what the corners and the middle of its box are.
        declared: whether it says that it takes such a call.
        ratio: the largest error / bound; None where nothing was compared, or it is not finite.
        case: that was run; of what was not measured, empty.
        message: what it said, or what is wrong.
    """

    dtype: str
    length: str
    heads: int
    queries: int
    page: int
    kind: Kind
    measured: bool
    declared: bool
    ratio: float | None = None
    case: str = ""
    message: str = ""


Judge = Callable[[DecodeCase], Record]
"""Runs ``LAW`` on one case of the subject."""


def envelope(judge: Judge, supports: Supports, dtypes: tuple[str, ...], seed: int = 0) -> Iterator[list[Cell]]:
    """The cells of each dtype and class of lengths, in the order of the axes."""
    for dtype, length in product(dtypes, LENGTHS):
        part = _Part(judge, supports, dtype, length, seed)
        part.bisect((range(len(HEADS)), range(len(QUERIES)), range(len(PAGES))))
        yield part.cells()


class _Part:
    """One dtype and class of lengths."""

    def __init__(self, judge: Judge, supports: Supports, dtype: str, length: str, seed: int) -> None:
        self.judge, self.supports, self.dtype, self.length, self.seed = judge, supports, dtype, length, seed
        self.found: dict[Sizes, Cell] = {}
        self.inferred: dict[Sizes, Kind] = {}

    def bisect(self, box: _Box) -> None:
        """Judge the corners and the middle of a box, and of its halves where they differ."""
        ends = [sorted({side[0], side[-1]}) for side in box]
        points = [*product(*ends), tuple(side[len(side) // 2] for side in box)]
        kinds = {self._cell(_sizes(point)).kind for point in points}
        longest = max(range(3), key=lambda axis: len(box[axis]))
        if len(kinds) == 1:
            (kind,) = kinds
            self.inferred |= {_sizes(point): kind for point in product(*box)}
        elif len(box[longest]) > 1:
            middle = len(box[longest]) // 2
            for half in (box[longest][:middle], box[longest][middle:]):
                first, second, third = (half if axis == longest else side for axis, side in enumerate(box))
                self.bisect((first, second, third))

    def _cell(self, sizes: Sizes) -> Cell:
        if sizes not in self.found:
            heads, queries, page = sizes
            dims = (self.supports.latent_dims or ((512, 64),))[0]
            case = DecodeCase(
                dtype=self.dtype,
                seed=self.seed,
                seqlens=tuple(max(n, queries) for n in LENGTHS[self.length](page)),
                s=queries,
                num_heads=heads,
                kv_lora_rank=dims[0],
                qk_rope_head_dim=dims[1],
                page_size=page,
                causal=True in self.supports.causal,
            )
            record = self.judge(case)
            self.found[sizes] = self._made(sizes, kind_of(record), True, **_told(record, case))
        return self.found[sizes]

    def _made(self, sizes: Sizes, kind: Kind, measured: bool, **told: Any) -> Cell:
        heads, queries, page = sizes
        where = {"dtype": self.dtype, "length": self.length, "heads": heads, "queries": queries, "page": page}
        return Cell(**where, kind=kind, measured=measured, declared=self._declared(sizes), **told)  # type: ignore[arg-type]

    def _declared(self, sizes: Sizes) -> bool:
        heads, queries, page = sizes
        s = self.supports
        allowed = [(heads, s.num_heads), (page, s.page_sizes), (self.dtype, s.dtypes)]
        return all(known is None or value in known for value, known in allowed) and queries <= (s.max_s or queries)

    def cells(self) -> list[Cell]:
        """All of them, what was measured as it was."""
        return [
            self.found.get(sizes) or self._made(sizes, self.inferred[sizes], False)
            for sizes in product(HEADS, QUERIES, PAGES)
        ]


def _sizes(point: tuple[int, ...]) -> Sizes:
    return HEADS[point[0]], QUERIES[point[1]], PAGES[point[2]]


_ENDS = ("the process", "did not return", "it could not be made again")
"""How messages of a process that ended begin; those of exceptions begin with their class."""


def kind_of(record: Record) -> Kind:
    """What a record of one case says: an exception is a refusal, the end of the process is not."""
    if record.verdict == "crashed":
        return "ends the process" if record.message.startswith(_ENDS) else "refuses"
    kinds: dict[str, Kind] = {"pass": "right", "fail": "wrong", "unsupported": "refuses"}
    return kinds.get(record.verdict, "not judged")


def _told(record: Record, case: DecodeCase) -> dict[str, Any]:
    ratios = [record.worst, *(float(each["excess"]) for each in record.evidence)]
    finite = [ratio for ratio in ratios if ratio is not None and ratio < float("inf")]
    message = "" if record.verdict == "pass" else next(iter(record.message.splitlines()), record.verdict)
    return {"ratio": max(finite, default=None), "case": case.short_id, "message": message}
