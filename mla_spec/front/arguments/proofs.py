"""The arguments of commands: what shows that the suite can fail, and what presets are."""

from __future__ import annotations

from mla_spec.front import commands
from mla_spec.front.arguments.checks import add_records
from mla_spec.front.arguments.parsers import Parsers


def add_soundness(parsers: Parsers) -> None:
    parser = parsers.add_parser("soundness", help="hold emulated honest kernels against the bounds")
    parser.set_defaults(run=commands.run_soundness)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="emulated kernels (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")


def add_sensitivity(parsers: Parsers) -> None:
    parser = parsers.add_parser("sensitivity", help="the smallest faults that the laws would detect in a subject")
    parser.set_defaults(run=commands.run_sensitivity)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--law", action="append", default=[], metavar="NAME", help="let these detect; as for check")
    parser.add_argument("--device", default="cpu", help="torch device of the tensors (cpu)")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="cases per law and fault (20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--json", metavar="FILE", help="also write the card to FILE")
    add_records(parser)


def add_selftest(parsers: Parsers) -> None:
    parser = parsers.add_parser("selftest", help="run the suite on the planted bugs")
    parser.set_defaults(run=commands.run_selftest)
    parser.add_argument("--bug", action="append", default=[], metavar="ID", help="only this bug; repeatable")
    parser.add_argument("--quick", action="store_true", help="stop at the first law that kills a bug")
    parser.add_argument("--peers", action="store_true", help="also under the inputs and criteria of other projects")
    parser.add_argument(
        "--explain",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="only count for how many bugs of decode, prefill, rope and layer the cause is named, and by what; of N, evenly chosen",
    )
    parser.add_argument("--catalogue", action="store_true", help="only list the reported faults, planted or not")
    parser.add_argument("--examples", type=int, default=25, metavar="N", help="generated cases per law (25)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the generation (0)")
    parser.add_argument("--device", default="cpu", help="torch device of the laws (cpu)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="bugs at once (2)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a case may take (300)")
    parser.add_argument("--json", metavar="FILE", help="also write all records to FILE")
    add_records(parser)
    parser.add_argument(
        "--markdown",
        action="append",
        default=[],
        metavar="FILE",
        help="also write the matrix to FILE, or the score between its marks; repeatable",
    )
    parser.add_argument("--read", metavar="FILE", help="a matrix that --json wrote, instead of running the laws")


def add_coverage(parsers: Parsers) -> None:
    parser = parsers.add_parser("coverage", help="cases and killed bugs by law, regime and dtype")
    parser.set_defaults(run=commands.run_coverage)
    parser.add_argument(
        "subjects", nargs="*", default=["torch-absorbed"], metavar="SUBJECT", help="as for check (torch-absorbed)"
    )
    parser.add_argument("--selftest", metavar="FILE", help="a kill matrix; default: the first kills, found anew")
    parser.add_argument("--examples", type=int, default=400, metavar="N", help="generated cases per law (400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the generation (0)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument("--json", metavar="FILE", help="also write all cells to FILE")


def add_profiles(parsers: Parsers) -> None:
    parser = parsers.add_parser("profiles", help="list the presets of arithmetic, each with its source")
    parser.set_defaults(run=commands.run_profiles)


def add_profile(parsers: Parsers) -> None:
    parser = parsers.add_parser("profile", help="propose the strictest preset that a subject's decode satisfies")
    parser.set_defaults(run=commands.run_profile)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--device", default="cpu", help="torch device of the tensors (cpu)")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--cases", type=int, default=40, metavar="N", help="cases (40)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
