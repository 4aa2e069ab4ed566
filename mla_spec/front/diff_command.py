"""The command ``mla-spec diff``."""

from __future__ import annotations

import argparse

from mla_spec.front.reports.account import read_document
from mla_spec.front.reports.difference import Change, Difference, Step, differences
from mla_spec.front.reports.heat import ratio_text
from mla_spec.text.layout import Screen
from mla_spec.text.table import format_table
from mla_spec.text.terminal import write_json

SHOWN = 12
"""Laws of each kind of change that are shown without -v."""

_STYLES: dict[Change, str] = {"worse": "red", "better": "green", "judged now": "green", "judged no more": "yellow"}


def diff(options: argparse.Namespace) -> int:
    """Print what changed from one run to another; 1 where something got worse, else 0."""
    found = differences(read_document([options.old]), read_document([options.new]))
    screen = Screen.of()
    print("\n\n".join("\n".join(_lines(each, screen, options.verbose)) for each in found))
    if options.json is not None:
        write_json(options.json, [each.as_dict() for each in found])
    return int(any(each.of("worse") for each in found))


def _lines(found: Difference, screen: Screen, verbose: bool) -> list[str]:
    style = "red" if found.of("worse") else "green"
    lines = [screen.paint(screen.cut(f"{found.subject}: {found.headline}"), style, "bold")]
    lines += [line for text in found.runs for line in screen.wrapped(text, "  ", "    ", most=2)]
    styles: dict[Change, str] = {**_STYLES, "still wrong": "yellow"} if verbose else _STYLES
    for change, color in styles.items():
        laws = _by_law(found.of(change))
        if not laws:
            continue
        lines.append(screen.paint(f"{change}:", color))
        shown = laws if verbose else laws[:SHOWN]
        lines += [line for text in shown for line in screen.wrapped(text, "  ", "    ", most=2)]
        lines += [f"  {len(laws) - len(shown)} more laws: -v has all"] if len(shown) < len(laws) else []
    return lines + _moved(found, screen, verbose)


def _moved(found: Difference, screen: Screen, verbose: bool) -> list[str]:
    moved = found.moved if verbose else found.moved[:SHOWN]
    if not moved:
        return []
    table = format_table((step.law, step.dtype, _ratios(step)) for step in moved)
    head = f"error / bound in the same cases, {len(found.moved)} moved:"
    return [head, *(screen.cut(f"  {line}") for line in table.splitlines())]


def _by_law(steps: list[Step]) -> list[str]:
    """A sentence for each law and change, which names the dtypes."""
    groups: dict[tuple[str, str, str], list[Step]] = {}
    for step in steps:
        groups.setdefault((step.law, step.old, step.new), []).append(step)
    return [
        f"{law} in {', '.join(step.dtype for step in group) or 'no dtype'}: {old}, now {new}"
        + (f": {group[0].what}" if group[0].what else "")
        for (law, old, new), group in groups.items()
    ]


def _ratios(step: Step) -> str:
    return f"{ratio_text(step.old_ratio) or 'exact'}, now {ratio_text(step.new_ratio) or 'exact'}"
