"""Maps of error / bound: operations by dtype, laws by regime, queries by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mla_spec.front.overview import by_operation, dtypes_of, held
from mla_spec.front.reports.account import Account
from mla_spec.judging.anatomy import GRID
from mla_spec.judging.causes import needs
from mla_spec.judging.error_text import axis_names, place_text
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import REGIMES, parse_case

Kind = Literal["none", "exact", "within", "wrong", "unclear", "refuses"]


@dataclass(frozen=True)
class Square:
    """One field of a map.

    Attributes:
        kind: "none" where nothing was judged, "exact" where all bits are right, "within" a bound, "wrong", or "unclear".
        ratio: the largest error / bound; None where there is none, or it is not finite.
        text, more: shown in the field.
        pale: whether it was not measured itself.
        title: the same in words.
    """

    kind: Kind = "none"
    ratio: float | None = None
    text: str = ""
    title: str = "not judged"
    more: str = ""
    pale: bool = False


@dataclass(frozen=True)
class Heat:
    """A map: a square for each row and column."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Square, ...]], ...]
    note: str = ""

    @property
    def kinds(self) -> set[Kind]:
        """Of all fields."""
        return {square.kind for _, squares in self.rows for square in squares}


def ratio_text(ratio: float | None) -> str:
    """A ratio in at most five characters: "0.52", "93", "4e+14"; empty where there is none."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}" if ratio < 1000 else f"{ratio:.0e}"


def excess(record: Record) -> float | None:
    """The largest error / bound of a record, that of its failures included; None where there is none that is finite."""
    wrong = [float(each["excess"]) for each in record.evidence if each["judged"] == "within"]
    known = [ratio for ratio in [record.worst, *wrong] if ratio is not None and math.isfinite(ratio)]
    return max(known, default=None)


def operations_by_dtype(account: Account) -> Heat:
    """How many laws hold, and how near the bound results came."""
    records, dtypes = list(account.records), dtypes_of(list(account.records))
    rows = tuple(
        (name, tuple(_of_dtype(group, dtype, account.judged) for dtype in dtypes))
        for name, group in by_operation(records).items()
    )
    return Heat("Operations and dtypes", "laws that hold, largest error / bound", tuple(dtypes), rows)


def _of_dtype(group: list[Record], dtype: str, judged: Sequence[Record]) -> Square:
    laws = {record.law for record in group}
    cells = [record for record in judged if record.law in laws and record.dtype == dtype]
    if not cells:
        return Square()
    ratio = max((r for r in map(excess, cells) if r is not None), default=None)
    kind = _kind(cells, ratio)
    count = held(group, dtype)
    return Square(kind, ratio, count, f"{count} laws hold{_words(ratio)}", ratio_text(ratio))


def _words(ratio: float | None) -> str:
    return "" if ratio is None else f", largest error / bound {ratio_text(ratio)}"


def _kind(cells: Sequence[Record], ratio: float | None) -> Kind:
    if any(record.verdict in ("fail", "crashed") for record in cells):
        return "wrong"
    if any(record.verdict == "incomplete" for record in cells):
        return "unclear"
    return "exact" if ratio is None else "within"


_NAMES = tuple(dict.fromkeys(name for regimes in REGIMES.values() for name, _ in regimes))


def regimes_by_law(account: Account) -> list[Heat]:
    """A map of each operation whose cases have regimes."""
    heats = []
    for name, group in by_operation(list(account.records)).items():
        seen = {regime for record in group for regime in record.regimes}
        regimes = [regime for regime in _NAMES if regime in seen] + sorted(seen - set(_NAMES))
        if regimes:
            rows = tuple((record.law, tuple(_of_regime(record, regime) for regime in regimes)) for record in group)
            heats.append(Heat(name, "law", tuple(regimes), rows))
    return heats


def _of_regime(record: Record, regime: str) -> Square:
    count = record.regimes.get(regime)
    if not count:
        return Square()
    ratio, failed = count["worst"], count["failed"]
    title = f"{count['cases']} cases" + (f", {failed} of them wrong" if failed else "") + _words(ratio)
    kind: Kind = "wrong" if failed else "exact" if ratio is None else "within"
    return Square(kind, ratio, ratio_text(ratio) or ("✗" if failed else "="), title)


def queries_by_head(record: Record) -> Heat | None:
    """Where the richest wrong result of a record is wrong; None where it has no heads, or but one field."""
    for anatomy in reversed(record.evidence):
        grid, names = anatomy["grid"], axis_names(anatomy, needs(record))
        if sum(map(len, grid)) < 2 or len(names) < 3 or names[-2] != "head":
            continue
        heads, others = anatomy["shape"][-2], math.prod(anatomy["shape"][:-2])
        rows, columns = _spans(others, GRID[0]), _spans(heads, GRID[1])
        squares = tuple(
            (_row_name(anatomy, span, names), tuple(_of_error(x) for x in line))
            for span, line in zip(rows, grid, strict=False)
        )
        place = f"{record.law}: wrong {place_text(anatomy, needs(record))}"
        corner = f"{', '.join(names[:-2])} ↓ head →"
        return Heat(place, corner, tuple(columns), squares, parse_case(anatomy["case"]).short_id)
    return None


def _row_name(anatomy: dict[str, Any], span: str, names: list[str]) -> str:
    """Of a row that stands for one place, its index on each axis; of others, which rows it stands for."""
    if "-" in span or len(names) == 3:
        return span
    index, parts = int(span), []
    for extent in reversed(anatomy["shape"][:-2]):
        index, place = divmod(index, extent)
        parts.append(str(place))
    return ", ".join(reversed(parts))


def _spans(extent: int, most: int) -> list[str]:
    """Which indices each line of a grid stands for."""
    step = max(1, -(-extent // most))
    ends = [(i, min(i + step, extent) - 1) for i in range(0, extent, step)]
    return [str(a) if a == b else f"{a}-{b}" for a, b in ends]


def _of_error(error: float | str) -> Square:
    ratio = float(error)
    kind: Kind = "within" if ratio <= 1 else "wrong"
    finite = ratio if math.isfinite(ratio) else None
    return Square(kind, finite, "", f"error / bound {ratio:.3g}")
