"""The arguments of each command of ``mla-spec``."""

from __future__ import annotations

import argparse
from typing import Any

from mla_spec.front import commands

Parsers = Any
"""What ``add_subparsers`` returns; argparse keeps its class to itself."""


def _add_check(parsers: Parsers) -> None:
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
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch on the CPU (1)")
    parser.add_argument(
        "--compile", metavar="BACKEND", help="also check what torch.compile makes with it, e.g. inductor"
    )
    _add_production(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="elementary laws alone, on small adversarial cases first, for slow subjects; docs/quick_check.md says what it leaves out",
    )
    parser.add_argument("--examples", type=int, metavar="N", help="generated cases per law (100; 8 with --quick)")
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
        help="seconds in which known faults are tried on what fails (a fifth of the work done, at most 30)",
    )
    _add_script(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="also every law, and each failure in full")
    parser.add_argument("--json", metavar="FILE", help="also write a record of each law to FILE")
    _add_records(parser)


def _add_export(parsers: Parsers) -> None:
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


def _add_answer(parsers: Parsers) -> None:
    parser = parsers.add_parser("answer", help="have a Python subject answer the calls of a folder")
    parser.set_defaults(run=commands.run_answer)
    parser.add_argument("folder", metavar="DIR", help="what `mla-spec export` or `mla_spec.record` wrote")
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--into", metavar="NEW", help="answer all calls again, in a new folder")


def _add_judge(parsers: Parsers) -> None:
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
    _add_records(parser)


def _add_campaign(parsers: Parsers) -> None:
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
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="generated cases per law and seed (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (0)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="worker processes, without --ray (2)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a case may take (300)")


def _add_explain(parsers: Parsers) -> None:
    parser = parsers.add_parser("explain", help="what may be wrong with an implementation that fails a case")
    parser.set_defaults(run=commands.run_explain)
    parser.add_argument("case", metavar="CASE", help="id of a case, as a report gives it")
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--law", metavar="NAME", help="the law that fails (the first that compares with the reference)")
    parser.add_argument("--signature", metavar="OPERATION", help="the operation a bare function implements")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds the case may take (300)")
    _add_script(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the record with its cause to FILE")


def _add_script(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="also write the smallest failing case to FILE, a script that needs torch and the kernel alone",
    )


def _add_merge(parsers: Parsers) -> None:
    parser = parsers.add_parser("merge", help="one report of the records of several runs, such as the shards of one")
    parser.set_defaults(run=commands.run_merge)
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `mla-spec check --records` wrote")
    parser.add_argument("--waivers", metavar="FILE", help="as for check")
    parser.add_argument("--json", metavar="FILE", help="also write a record of each law to FILE")


def _add_report(parsers: Parsers) -> None:
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
    _add_output(parser)


def _add_diff(parsers: Parsers) -> None:
    parser = parsers.add_parser("diff", help="what changed between the records of two versions of an implementation")
    parser.set_defaults(run=commands.run_diff)
    parser.add_argument("old", metavar="OLD", help="what `mla-spec check --records` wrote before")
    parser.add_argument("new", metavar="NEW", help="and now")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also what is still wrong, and every error that moved"
    )
    parser.add_argument("--json", metavar="FILE", help="also write what changed to FILE")


def _add_dump(parsers: Parsers) -> None:
    parser = parsers.add_parser("dump", help="write the tensors of a case, exactly as a law gives them")
    parser.set_defaults(run=commands.run_dump)
    parser.add_argument("case", metavar="CASE", help="id of a case, as a report gives it")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="in the format of safetensors (the case's kind, such as decode.safetensors)",
    )


def _add_statement(parsers: Parsers) -> None:
    parser = parsers.add_parser("statement", help="what records show of an implementation, level by level, and a badge")
    parser.set_defaults(run=commands.run_statement)
    parser.add_argument("files", nargs="+", metavar="RECORDS", help="what `mla-spec check --records` wrote")
    _add_output(parser)
    parser.add_argument("--badge", metavar="FILE", help="also write a badge to FILE, as SVG")


def _add_map(parsers: Parsers) -> None:
    parser = parsers.add_parser("map", help="for which sizes a decode is right, refuses, or is silently wrong")
    parser.set_defaults(run=commands.run_map)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--signature", metavar="NAME", help="as for check")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a call may take (300)")
    _add_output(parser)
    parser.add_argument("--json", metavar="FILE", help="also write every cell to FILE, one a line")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="where it is written (standard output)")


def _add_production(parser: argparse.ArgumentParser) -> None:
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
        '"s": 1, "num_heads": 128, "page_size": 64}; docs/production.md has the fields',
    )


def _add_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", metavar="FILE", help="append each record to FILE as it is made, one a line")


def _add_soundness(parsers: Parsers) -> None:
    parser = parsers.add_parser("soundness", help="hold emulated honest kernels against the bounds")
    parser.set_defaults(run=commands.run_soundness)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="emulated kernels (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")


def _add_sensitivity(parsers: Parsers) -> None:
    parser = parsers.add_parser("sensitivity", help="the smallest faults that the laws would detect in a subject")
    parser.set_defaults(run=commands.run_sensitivity)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--device", default="cpu", help="torch device of the tensors (cpu)")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="cases per law and fault (20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--json", metavar="FILE", help="also write the card to FILE")
    _add_records(parser)


def _add_selftest(parsers: Parsers) -> None:
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
        help="only count for how many bugs of decode, prefill, rope and layer the cause is named; of N, evenly chosen",
    )
    parser.add_argument("--catalogue", action="store_true", help="only list the reported faults, planted or not")
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="generated cases per law (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the generation (0)")
    parser.add_argument("--device", default="cpu", help="torch device of the laws (cpu)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="bugs at once (2)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a case may take (300)")
    parser.add_argument("--json", metavar="FILE", help="also write all records to FILE")
    _add_records(parser)
    parser.add_argument(
        "--markdown",
        action="append",
        default=[],
        metavar="FILE",
        help="also write the matrix to FILE, or the score between its marks; repeatable",
    )
    parser.add_argument("--read", metavar="FILE", help="a matrix that --json wrote, instead of running the laws")


def _add_coverage(parsers: Parsers) -> None:
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


def _add_laws(parsers: Parsers) -> None:
    parser = parsers.add_parser("laws", help="list the laws")
    parser.add_argument("--quick", action="store_true", help="only those of a quick check")
    parser.set_defaults(run=commands.run_laws)


def _add_contract(parsers: Parsers) -> None:
    parser = parsers.add_parser("contract", help="print how an operation is called, and what it must give")
    parser.set_defaults(run=commands.run_contract)
    parser.add_argument("operation", nargs="?", metavar="OPERATION", help="default: the calls of all")


def _add_profiles(parsers: Parsers) -> None:
    parser = parsers.add_parser("profiles", help="list the presets of arithmetic, each with its source")
    parser.set_defaults(run=commands.run_profiles)


def _add_profile(parsers: Parsers) -> None:
    parser = parsers.add_parser("profile", help="propose the strictest preset that a subject's decode satisfies")
    parser.set_defaults(run=commands.run_profile)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--device", default="cpu", help="torch device of the tensors (cpu)")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--cases", type=int, default=40, metavar="N", help="cases (40)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")


def _add_signatures(parsers: Parsers) -> None:
    parser = parsers.add_parser("signatures", help="list the public kernels whose signature --signature takes")
    parser.set_defaults(run=commands.run_signatures)


def _add_adapters(parsers: Parsers) -> None:
    parser = parsers.add_parser(
        "adapters", help="list the adapters that ship: version, whether they run here, operations"
    )
    parser.set_defaults(run=commands.run_adapters)


def _add_new(parsers: Parsers) -> None:
    parser = parsers.add_parser("new", help="write an adapter of a public kernel's signature, to be changed")
    parser.set_defaults(run=commands.run_new)
    parser.add_argument("signature", metavar="SIGNATURE", help="as `mla-spec signatures` lists it")
    parser.add_argument(
        "--kernel", metavar="OBJECT", help="package.module:object that it calls (default: the public kernel)"
    )


def _add_models(parsers: Parsers) -> None:
    parser = parsers.add_parser("models", help="list the published MLA models")
    parser.set_defaults(run=commands.run_models)


def _add_cache(parsers: Parsers) -> None:
    parser = parsers.add_parser("cache", help="exact cache sizes of a published model, or of a configuration file")
    parser.set_defaults(run=commands.run_cache)
    parser.add_argument("model", metavar="MODEL", help="a name of `mla-spec models`, a config.json, or its folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the cache (bfloat16)")
    parser.add_argument("--tokens", type=int, default=1, metavar="N", help="tokens per sequence (1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--page-size", type=int, default=1, metavar="N", help="tokens per page (1)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks of tensor parallelism (1)")
    parser.add_argument("--layout", metavar="NAME", help="also in this quantised layout, e.g. fp8_ds_mla")
    parser.add_argument("--training", action="store_true", help="what a training step keeps of activations instead")


def _add_embed(parsers: Parsers) -> None:
    parser = parsers.add_parser("embed", help="an existing model's MHA, GQA or MQA with rotary embedding as exact MLA")
    parser.set_defaults(run=commands.run_embed)
    parser.add_argument("config", metavar="CONFIG", help="a config.json with transformers' names, or its folder")


def _add_golden(parsers: Parsers) -> None:
    parser = parsers.add_parser(
        "golden",
        help="verify or regenerate the golden files, check a subject by them, or certify the reference in ball arithmetic",
    )
    parser.set_defaults(run=commands.run_golden)
    parser.add_argument("action", choices=("verify", "regenerate", "check", "certify"))
    parser.add_argument("subject", nargs="?", metavar="SUBJECT", help="to check, as for `mla-spec check`")
    parser.add_argument("--device", default="cpu", help="torch device of a check (cpu)")
    parser.add_argument("--json", metavar="FILE", help="also write the records of a check to FILE")
    parser.add_argument("--dir", metavar="DIR", help="the corpus to verify or regenerate (default: the installed one)")
    parser.add_argument("--cases", type=int, default=240, metavar="N", help="cases to certify (240)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases to certify (0)")


def _add_book(parsers: Parsers) -> None:
    parser = parsers.add_parser(
        "book", help="write a page for each operation: its contract, its laws, the bugs they find"
    )
    parser.set_defaults(run=commands.run_book)
    parser.add_argument("folder", metavar="DIR", help="where the pages go; it is made if need be")


COMMANDS = (
    _add_check,
    _add_explain,
    _add_export,
    _add_answer,
    _add_judge,
    _add_map,
    _add_merge,
    _add_report,
    _add_statement,
    _add_diff,
    _add_dump,
    _add_campaign,
    _add_soundness,
    _add_sensitivity,
    _add_selftest,
    _add_coverage,
    _add_laws,
    _add_contract,
    _add_profiles,
    _add_profile,
    _add_adapters,
    _add_signatures,
    _add_new,
    _add_models,
    _add_cache,
    _add_embed,
    _add_golden,
    _add_book,
)
"""What adds each command, in the order of the help."""
