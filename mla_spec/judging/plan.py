"""What a run consists of: cells, each a law on a subject in one dtype, in an order that depends on nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mla_spec.judging.verdict import Record

_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True, order=True)
class Cell:
    """One law on one subject in one dtype.

    Attributes:
        spec: arguments by which ``mla-spec check`` finds the subject.
        law: its name.
        dtype: empty where the subject supports none that is asked for: one record says so.
        seed: of the generation.
    """

    spec: tuple[str, ...]
    law: str
    dtype: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.law} [{self.spec[0]}] {self.dtype}".strip()


Judged = tuple[Cell, Record]
"""A cell and what came of it."""


@dataclass(frozen=True)
class Shard:
    """The part ``number`` of a run that is divided into ``count``; both begin at 1."""

    number: int = 1
    count: int = 1

    def take(self, cells: Sequence[Cell]) -> list[Cell]:
        """Every ``count``-th cell: the parts have no cell in common, and all cells together."""
        return list(cells[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str) -> Shard:
    """The shard "i/n"; ValueError, in one sentence, where it is none."""
    found = _SHARD.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"a shard is i/n with 1 <= i <= n, such as 2/8; got {text!r}")
    return Shard(int(found[1]), int(found[2]))


def plan(specs: Iterable[tuple[tuple[str, ...], Sequence[str]]], laws: Iterable[str], seed: int = 0) -> list[Cell]:
    """The cells of a run, subject by subject and law by law; ``specs`` pairs each subject with its dtypes."""
    laws = list(laws)
    return [Cell(spec, law, dtype, seed) for spec, dtypes in specs for law in laws for dtype in dtypes or ("",)]
