"""The arguments of commands: runs on subjects."""

from __future__ import annotations

import argparse

from mla_spec.front import commands
from mla_spec.front.arguments.parsers import Parsers
from mla_spec.front.arguments.reports import add_output


def add_check(parsers: Parsers) -> None:
    parser = parsers.add_parser("check", help="run the laws on implementations")
    parser.set_defaults(run=commands.run_check)
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="SUBJECT",
        help="a shipped name, package.module:object, file.py:object or deepseek:model.py; default: all that can run here",
    )
    parser.add_argument(
        "--command",
        action="append",
        default=[],
        metavar="COMMAND",
        help="a program that answers calls through a pipe (docs/exchange.md), e.g. './my_program' or 'ssh host ./my_program'; "
        "repeatable",
    )
    parser.add_argument(
        "--signature",
        metavar="NAME",
        help="the operation a bare function implements, or the public kernel it is called like, e.g. flash-mla "
        "(`mla-spec signatures`)",
    )
    parser.add_argument(
        "--law",
        action="append",
        default=[],
        metavar="NAME",
        help="only this law, those that a pattern such as 'test_decode_*' matches, or those of an operation; repeatable",
    )
    parser.add_argument("--case", metavar="ID", help="run this one case (with one --law)")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument(
        "--config", metavar="FILE", help="draw the dims of this config.json only, where a kernel has dims"
    )
    parser.add_argument("--device", default="cpu", help="torch device, or several: cuda:0,cuda:1 or cuda:* (cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch on the CPU (1)")
    parser.add_argument(
        "--compile", metavar="BACKEND", help="also check what torch.compile makes with it, e.g. inductor"
    )
    add_production(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="elementary laws alone, on small adversarial cases first, for slow subjects; docs/quick_check.md says what it leaves out",
    )
    parser.add_argument("--examples", type=int, metavar="N", help="generated cases per law (25; 8 with --quick)")
    parser.add_argument(
        "--minimise-seconds",
        type=float,
        metavar="S",
        help="seconds in which a smaller failing case is looked for, per law and dtype (60; 10 with --quick)",
    )
    parser.add_argument(
        "--no-minimise",
        dest="minimise",
        action="store_false",
        help="report the first failing case as it is, for slow subjects: a smaller one takes many calls",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the generation (another each time, and printed)")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="processes that judge, each with a subject (2)"
    )
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a call may take (300)")
    parser.add_argument(
        "--under", default="", metavar="COMMAND", help='run subjects under it, e.g. "compute-sanitizer --tool memcheck"'
    )
    parser.add_argument("--in-process", action="store_true", help="no worker processes, for debuggers")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="seconds after which the run ends with what is judged by then"
    )
    parser.add_argument("--waivers", metavar="FILE", help="expected failures; docs/waivers.md shows such a file")
    parser.add_argument("--shard", metavar="I/N", help="only part I of N; `mla-spec merge` puts their records together")
    parser.add_argument("--begin", metavar="FILE", help="cases to begin with, as `mla-spec campaign` keeps the hardest")
    parser.add_argument("--resume", metavar="FILE", help="as --records FILE, without what FILE already has")
    parser.add_argument(
        "--explain",
        type=float,
        metavar="S",
        help="seconds in which known faults are tried on what fails (a fifth of the work done, at least 8, at most 30)",
    )
    add_script(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="also every law, and each failure in full")
    parser.add_argument("--json", metavar="FILE", help="also write a record of each law to FILE")
    add_records(parser)


def add_explain(parsers: Parsers) -> None:
    parser = parsers.add_parser("explain", help="what may be wrong with an implementation that fails a case")
    parser.set_defaults(run=commands.run_explain)
    parser.add_argument("case", metavar="CASE", help="id of a case, as a report gives it")
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--law", metavar="NAME", help="the law that fails (the first that compares with the reference)")
    parser.add_argument("--signature", metavar="OPERATION", help="the operation a bare function implements")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds the case may take (300)")
    add_script(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the record with its cause to FILE")


def add_export(parsers: Parsers) -> None:
    parser = parsers.add_parser(
        "export", help="write the calls that laws make into a folder, for any program to answer"
    )
    parser.set_defaults(run=commands.run_export)
    parser.add_argument("folder", metavar="DIR", help="a new folder, or one whose answers allow another round of calls")
    parser.add_argument(
        "--subject",
        metavar="SUBJECT",
        help="what will answer, as for check, or a .json file of what it declares (default: all operations, all they take)",
    )
    parser.add_argument("--operation", action="append", default=[], metavar="NAME", help="only its laws; repeatable")
    parser.add_argument("--law", action="append", default=[], metavar="NAME", help="as for check")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--examples", type=int, metavar="N", help="generated cases per law (10)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the generation (another each time, and printed)")
    parser.add_argument(
        "--most", type=float, default=1024, metavar="MIB", help="MiB of all calls in DIR, at most (1024)"
    )


def add_answer(parsers: Parsers) -> None:
    parser = parsers.add_parser("answer", help="have a Python subject answer the calls of a folder")
    parser.set_defaults(run=commands.run_answer)
    parser.add_argument("folder", metavar="DIR", help="what `mla-spec export` or `mla_spec.record` wrote")
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--into", metavar="NEW", help="answer all calls again, in a new folder")


def add_judge(parsers: Parsers) -> None:
    parser = parsers.add_parser("judge", help="run the laws on the answers that a folder holds")
    parser.set_defaults(run=commands.run_judge, check=parsers.choices["check"])
    parser.add_argument("folder", metavar="DIR", help="what `mla-spec export` wrote, with answers")
    parser.add_argument("--law", action="append", default=[], metavar="NAME", help="only this law, as for check")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that judge (2)")
    parser.add_argument("--in-process", action="store_true", help="no worker processes, for a few calls")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a call may take (300)")
    parser.add_argument("--waivers", metavar="FILE", help="as for check")
    parser.add_argument("--explain", type=float, metavar="S", help="as for check")
    parser.add_argument("-v", "--verbose", action="store_true", help="also every law, and each failure in full")
    parser.add_argument("--json", metavar="FILE", help="also write a record of each law to FILE")
    add_records(parser)


def add_replay(parsers: Parsers) -> None:
    parser = parsers.add_parser("replay", help="run recorded calls again, and make one that fails smaller")
    parser.set_defaults(run=commands.run_replay)
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="what `mla_spec.record` or FlashInfer's flight recorder wrote, or files of tensors",
    )
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--signature", metavar="NAME", help="as for check")
    parser.add_argument("--map", metavar="FILE", help="of files of tensors: which is which; docs/exchange.md shows one")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a call may take (300)")
    parser.add_argument(
        "--minimise-seconds",
        type=float,
        default=60,
        metavar="S",
        help="seconds in which a smaller call is looked for, for each that fails (60)",
    )
    parser.add_argument("--into", metavar="NEW", help="write the smallest failing calls into a new folder")
    parser.add_argument("--export", metavar="FILE", help="also write the first of them as a script without mla-spec")
    parser.add_argument("--json", metavar="FILE", help="also write the records to FILE")


def add_map(parsers: Parsers) -> None:
    parser = parsers.add_parser("map", help="for which sizes an operation is right, refuses, or is silently wrong")
    parser.set_defaults(run=commands.run_map)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--signature", metavar="NAME", help="as for check")
    parser.add_argument(
        "--operation",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one of the operations that have a lattice of sizes; repeatable",
    )
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a call may take (300)")
    add_output(parser)
    parser.add_argument("--json", metavar="FILE", help="also write every cell to FILE, one a line")


def add_campaign(parsers: Parsers) -> None:
    parser = parsers.add_parser("campaign", help="run the laws with one seed after another, and keep the hardest cases")
    parser.set_defaults(run=commands.run_campaign)
    parser.add_argument("subjects", nargs="+", metavar="SUBJECT", help="as for check")
    parser.add_argument("--records", metavar="FILE", default="campaign.jsonl", help="what is judged (campaign.jsonl)")
    parser.add_argument("--corpus", metavar="FILE", default="hardest.jsonl", help="the hardest cases (hardest.jsonl)")
    parser.add_argument("--hours", type=float, metavar="H", help="end after so many hours")
    parser.add_argument("--rounds", type=int, metavar="N", help="end after so many seeds")
    parser.add_argument("--ray", metavar="ADDRESS", help="on this Ray cluster; `local` starts one on this machine")
    parser.add_argument("--law", action="append", default=[], metavar="NAME", help="as for check")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--device", default="cpu", help="torch device, or several: cuda:0,cuda:1 or cuda:* (cpu)")
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="generated cases per law and seed (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (0)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="worker processes, without --ray (2)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a case may take (300)")


def add_script(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="also write the smallest failing case to FILE, a script that needs torch and the kernel alone",
    )


def add_production(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--production",
        action="store_true",
        help="also check whole published widths at loads that grow up to 128 sequences of 8192 keys, of which a stated sample "
        "is judged",
    )
    parser.add_argument(
        "--budget", type=float, metavar="S", help="seconds that each law of --production may take in all dtypes (60)"
    )
    parser.add_argument(
        "--workload",
        metavar="FILE",
        help='--production with recorded shapes, a JSON object a line, e.g. {"operation": "decode", "seqlens": [8192, 300], '
        '"s": 1, "num_heads": 128, "page_size": 64}, or a folder of recorded calls; docs/production.md has the fields',
    )


def add_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", metavar="FILE", help="append each record to FILE as it is made, one a line")
