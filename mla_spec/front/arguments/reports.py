"""The arguments of commands: what is made of records and cases."""

from __future__ import annotations

import argparse

from mla_spec.front import commands
from mla_spec.front.arguments.parsers import Parsers


def add_merge(parsers: Parsers) -> None:
    parser = parsers.add_parser("merge", help="one report of the records of several runs, such as the shards of one")
    parser.set_defaults(run=commands.run_merge)
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `mla-spec check --records` wrote")
    parser.add_argument("--waivers", metavar="FILE", help="as for check")
    parser.add_argument("--json", metavar="FILE", help="also write a record of each law to FILE")


def add_report(parsers: Parsers) -> None:
    parser = parsers.add_parser("report", help="a page, a summary, test results or annotations from records")
    parser.set_defaults(run=commands.run_report)
    parser.add_argument("files", nargs="+", metavar="RECORDS", help="what `mla-spec check --records` wrote")
    parser.add_argument(
        "--format",
        choices=("markdown", "html", "junit", "github"),
        default="markdown",
        help="for a pull request or the summary of a job, one page for a browser, JUnit XML, or annotations of GitHub "
        "Actions (markdown)",
    )
    add_output(parser)


def add_statement(parsers: Parsers) -> None:
    parser = parsers.add_parser("statement", help="what records show of an implementation, level by level, and a badge")
    parser.set_defaults(run=commands.run_statement)
    parser.add_argument("files", nargs="+", metavar="RECORDS", help="what `mla-spec check --records` wrote")
    add_output(parser)
    parser.add_argument("--badge", metavar="FILE", help="also write a badge to FILE, as SVG")


def add_diff(parsers: Parsers) -> None:
    parser = parsers.add_parser("diff", help="what changed between the records of two versions of an implementation")
    parser.set_defaults(run=commands.run_diff)
    parser.add_argument("old", metavar="OLD", help="what `mla-spec check --records` wrote before")
    parser.add_argument("new", metavar="NEW", help="and now")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also what is still wrong, and every error that moved"
    )
    parser.add_argument("--json", metavar="FILE", help="also write what changed to FILE")


def add_dump(parsers: Parsers) -> None:
    parser = parsers.add_parser("dump", help="write the tensors of a case, exactly as a law gives them")
    parser.set_defaults(run=commands.run_dump)
    parser.add_argument("case", metavar="CASE", help="id of a case, as a report gives it")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="in the format of safetensors (the case's kind, such as decode.safetensors)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="where it is written (standard output)")
