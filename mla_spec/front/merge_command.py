"""The command ``mla-spec merge``."""

from __future__ import annotations

import argparse
import sys

from mla_spec.front.gathered import gather
from mla_spec.front.overview import overview
from mla_spec.front.report import merged
from mla_spec.judging.waivers import WaiverError, Waivers, read_waivers
from mla_spec.text.layout import Screen
from mla_spec.text.terminal import UsageError, write_json


def merge(options: argparse.Namespace) -> int:
    """Print one report of the records of many files, and return its exit code."""
    try:
        waivers = Waivers() if options.waivers is None else read_waivers(options.waivers)
    except WaiverError as error:
        raise UsageError(f"--waivers {error}") from error
    gathered = gather(options.files, waivers)
    out = sys.stderr if options.json == "-" else sys.stdout
    screen, part = Screen.of(out), bool(gathered.missing)
    for line in gathered.subjects.values():
        records = merged(record for cell, record in gathered.ordered() if cell.spec == line.spec)
        print(screen.cut(f"{line.name}: offers {', '.join(line.operations)}"), file=out)
        print(f"{overview(records, screen, part=part)}\n", file=out)
    remarks = [*gathered.remarks(), *gathered.faults()]
    for remark in remarks:
        print(f"mla-spec: {remark}", file=out)
    if options.json is not None:
        write_json(options.json, [record.as_dict() for record in merged(record for _, record in gathered.ordered())])
    return gathered.exit_code
