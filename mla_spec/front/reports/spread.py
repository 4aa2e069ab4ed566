"""Pictures of how large errors are: beside their bounds, and beside what the declared arithmetic predicts. Inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from mla_spec.front.reports.account import Account
from mla_spec.judging.causes import needs
from mla_spec.judging.spread import EXACT, POWERS, Spread, added

WIDTH, HEIGHT = 300, 130
"""Of a picture, in its own units."""

LEFT, BOTTOM, TOP = 8, 22, 10
"""What is left free beside, below and above the bars."""

Groups = dict[tuple[str, str], Spread]
"""By operation and dtype."""


def spreads(account: Account) -> Groups:
    """The counts of laws that hold and need one operation alone."""
    parts: dict[tuple[str, str], list[Spread]] = {}
    for cell, record in account.cells:
        if len(named := needs(record)) == 1 and record.spread:
            parts.setdefault((named[0], cell.dtype), []).append(record.spread)
    return {key: added(some) for key, some in parts.items()}


def pictures(groups: Groups) -> str:
    """A picture for each operation and dtype, first beside bounds, then beside what is predicted; "" where nothing was counted."""
    drawn = [
        picture(kind, f"{name}, {dtype}", found[kind])
        for kind in POWERS
        for (name, dtype), found in groups.items()
        if sum(found.get(kind, {}).values())
    ]
    return f'<div class="spreads">\n{"".join(drawn)}</div>\n' if drawn else ""


def picture(kind: str, of: str, counts: dict[str, int]) -> str:
    """Shares of elements by the size of their errors, on a scale of powers of two.

    Beside bounds a line stands at the bound; beside what is predicted it is the distribution of |x| for normal x of the predicted
    deviation, the largest that is declared.
    """
    powers, total = POWERS[kind], sum(counts.values())
    shares = [counts.get(str(power), 0) / total for power in powers]
    curve = [_normal_share(power) for power in powers] if kind == "predicted" else []
    top = max(*shares, *curve, 1e-9)
    over = _curve(curve, top) if curve else f'<path class="limit" d="M{_x(1)} {TOP / 2}V{HEIGHT - BOTTOM}"/>'
    title = f"{of}: error / {'bound' if kind == 'bound' else 'predicted deviation'}"
    exact = counts.get(EXACT, 0)
    share = "> 99%" if 0.995 <= exact / total < 1 else f"{exact / total:.0%}"
    note = f"{total:,} elements, {share} without an error{_rest(kind, counts)}"
    inside = "".join([*_bars(shares, top), over, *_labels(kind)])
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {note}")}">{inside}</svg>'
        f"<figcaption><strong>{escape(title)}</strong> {escape(note)}</figcaption></figure>\n"
    )


def _rest(kind: str, counts: dict[str, int]) -> str:
    largest = max((power for power in POWERS[kind] if counts.get(str(power))), default=None)
    if largest is None:
        return ""
    beyond = kind == "predicted" and largest == POWERS[kind][-1]
    what = "the bound" if kind == "bound" else "the largest deviation that is declared, whose distribution is the line"
    return f", the others {'above' if beyond else 'up to'} {2.0 ** (largest + (not beyond)):.3g} of {what}"


def _normal_share(power: int) -> float:
    """Of |x| between 2^power and twice that, for normal x of deviation 1."""
    low, high = (math.erf(2.0**p / math.sqrt(2)) for p in (power, power + 1))
    return high - low


def _x(part: float) -> float:
    return LEFT + part * (WIDTH - 2 * LEFT)


def _y(share: float, top: float) -> float:
    return HEIGHT - BOTTOM - share / top * (HEIGHT - BOTTOM - TOP)


def _bars(shares: list[float], top: float) -> Iterator[str]:
    width = (WIDTH - 2 * LEFT) / len(shares)
    for number, share in enumerate(shares):
        if share:
            height = max(1.0, HEIGHT - BOTTOM - _y(share, top))  # what is seen once in millions is a hair, not nothing
            yield (
                f'<rect class="bar" x="{_x(number / len(shares)) + 0.5:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
                f'width="{width - 1:.1f}" height="{height:.1f}"><title>{share:.2%}</title></rect>'
            )
    yield f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - LEFT}"/>'


def _curve(shares: list[float], top: float) -> str:
    points = " ".join(f"{_x((i + 0.5) / len(shares)):.1f},{_y(share, top):.1f}" for i, share in enumerate(shares))
    return f'<polyline class="limit" points="{points}"/>'


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _labels(kind: str) -> Iterator[str]:
    """A power at each fifth of the scale; 1 is where an error is what is allowed, or predicted."""
    powers = POWERS[kind]
    for power in range(powers[0], powers[-1] + 2, 5):
        part = (power - powers[0]) / len(powers)
        anchor = "start" if part == 0 else "end" if part == 1 else "middle"
        text = f"{2**power}" if power >= 0 else "2" + str(power).translate(_RAISED)
        yield f'<text x="{_x(part):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>'
