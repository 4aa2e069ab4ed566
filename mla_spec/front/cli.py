"""The command ``mla-spec``. Exit codes: 0 conforms, 1 violates, 2 usage, 3 incomplete."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mla_spec import __version__, installed
from mla_spec.front.help import add_examples
from mla_spec.front.limits import require_outputs, require_within_limits
from mla_spec.subjects.exits import INCOMPLETE, loud_exits
from mla_spec.text.terminal import UsageError, any_encoding, append_json, one_line, show_progress, write_json

Commands = Any
"""What ``add_subparsers`` returns; argparse keeps its class to itself."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    any_encoding()
    try:
        parser = _parser()
        _complete(parser)
        options = parser.parse_args(arguments)
        require_within_limits(vars(options))
        require_outputs(vars(options))
        code = _run(options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"mla-spec: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mla-spec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print("mla-spec: the report cannot be written: no space is left", file=sys.stderr)
        return INCOMPLETE


def _run(options: argparse.Namespace) -> int:
    """Run what was parsed; a subject that asks to end the process ends it as incomplete."""
    run: Any = options.run
    try:
        with loud_exits():
            return int(run(options))
    except SystemExit as error:
        print(f"mla-spec: SystemExit: {error} was raised before there was a report", file=sys.stderr)
        return INCOMPLETE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mla-spec",
        description="Conformance suite for Multi-head Latent Attention.",
        epilog="`mla-spec COMMAND --help` has the options, examples and exit codes of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mla-spec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for add in _COMMANDS:
        add(commands)
    add_examples(commands.choices)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that completes a line, and exit; nothing otherwise."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def _add_check(commands: Commands) -> None:
    parser = commands.add_parser("check", help="run the laws on implementations")
    parser.set_defaults(run=_check)
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="SUBJECT",
        help="a shipped name, package.module:object or file.py:object; default: all that can run here",
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
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="generated cases per law (100)")
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
    parser.add_argument("-v", "--verbose", action="store_true", help="also every law, and each failure in full")
    parser.add_argument("--json", metavar="FILE", help="also write a record of each law to FILE")
    _add_records(parser)


def _add_campaign(commands: Commands) -> None:
    parser = commands.add_parser(
        "campaign", help="run the laws with one seed after another, and keep the hardest cases"
    )
    parser.set_defaults(run=_campaign)
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


def _add_explain(commands: Commands) -> None:
    parser = commands.add_parser("explain", help="what may be wrong with an implementation that fails a case")
    parser.set_defaults(run=_explain)
    parser.add_argument("case", metavar="CASE", help="id of a case, as a report gives it")
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--law", metavar="NAME", help="the law that fails (the first that compares with the reference)")
    parser.add_argument("--signature", metavar="OPERATION", help="the operation a bare function implements")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds the case may take (300)")
    parser.add_argument("--json", metavar="FILE", help="also write the record with its cause to FILE")


def _add_merge(commands: Commands) -> None:
    parser = commands.add_parser("merge", help="one report of the records of several runs, such as the shards of one")
    parser.set_defaults(run=_merge)
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `mla-spec check --records` wrote")
    parser.add_argument("--waivers", metavar="FILE", help="as for check")
    parser.add_argument("--json", metavar="FILE", help="also write a record of each law to FILE")


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


def _add_soundness(commands: Commands) -> None:
    parser = commands.add_parser("soundness", help="hold emulated honest kernels against the bounds")
    parser.set_defaults(run=_soundness)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="emulated kernels (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")


def _add_sensitivity(commands: Commands) -> None:
    parser = commands.add_parser("sensitivity", help="the smallest faults that the laws would detect in a subject")
    parser.set_defaults(run=_sensitivity)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--device", default="cpu", help="torch device of the tensors (cpu)")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="cases per law and fault (20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")
    parser.add_argument("--json", metavar="FILE", help="also write the card to FILE")
    _add_records(parser)


def _add_selftest(commands: Commands) -> None:
    parser = commands.add_parser("selftest", help="run the suite on the planted bugs")
    parser.set_defaults(run=_selftest)
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


def _add_coverage(commands: Commands) -> None:
    parser = commands.add_parser("coverage", help="cases and killed bugs by law, regime and dtype")
    parser.set_defaults(run=_coverage)
    parser.add_argument(
        "subjects", nargs="*", default=["torch-absorbed"], metavar="SUBJECT", help="as for check (torch-absorbed)"
    )
    parser.add_argument("--selftest", metavar="FILE", help="a kill matrix; default: the first kills, found anew")
    parser.add_argument("--examples", type=int, default=400, metavar="N", help="generated cases per law (400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the generation (0)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument("--json", metavar="FILE", help="also write all cells to FILE")


def _add_laws(commands: Commands) -> None:
    parser = commands.add_parser("laws", help="list the laws")
    parser.set_defaults(run=_laws)


def _add_contract(commands: Commands) -> None:
    parser = commands.add_parser("contract", help="print how an operation is called, and what it must give")
    parser.set_defaults(run=_contract)
    parser.add_argument("operation", nargs="?", metavar="OPERATION", help="default: the calls of all")


def _add_profiles(commands: Commands) -> None:
    parser = commands.add_parser("profiles", help="list the presets of arithmetic, each with its source")
    parser.set_defaults(run=_profiles)


def _add_profile(commands: Commands) -> None:
    parser = commands.add_parser("profile", help="propose the strictest preset that a subject's decode satisfies")
    parser.set_defaults(run=_profile)
    parser.add_argument("subject", metavar="SUBJECT", help="as for check")
    parser.add_argument("--device", default="cpu", help="torch device of the tensors (cpu)")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    parser.add_argument("--cases", type=int, default=40, metavar="N", help="cases (40)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (0)")


def _add_signatures(commands: Commands) -> None:
    parser = commands.add_parser("signatures", help="list the public kernels whose signature --signature takes")
    parser.set_defaults(run=_signatures)


def _add_adapters(commands: Commands) -> None:
    parser = commands.add_parser(
        "adapters", help="list the adapters that ship: version, whether they run here, operations"
    )
    parser.set_defaults(run=_adapters)


def _add_new(commands: Commands) -> None:
    parser = commands.add_parser("new", help="write an adapter of a public kernel's signature, to be changed")
    parser.set_defaults(run=_new)
    parser.add_argument("signature", metavar="SIGNATURE", help="as `mla-spec signatures` lists it")
    parser.add_argument(
        "--kernel", metavar="OBJECT", help="package.module:object that it calls (default: the public kernel)"
    )


def _add_models(commands: Commands) -> None:
    parser = commands.add_parser("models", help="list the published MLA models")
    parser.set_defaults(run=_models)


def _add_cache(commands: Commands) -> None:
    parser = commands.add_parser("cache", help="exact cache sizes of a published model, or of a configuration file")
    parser.set_defaults(run=_cache)
    parser.add_argument("model", metavar="MODEL", help="a name of `mla-spec models`, a config.json, or its folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the cache (bfloat16)")
    parser.add_argument("--tokens", type=int, default=1, metavar="N", help="tokens per sequence (1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--page-size", type=int, default=1, metavar="N", help="tokens per page (1)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks of tensor parallelism (1)")
    parser.add_argument("--layout", metavar="NAME", help="also in this quantised layout, e.g. fp8_ds_mla")
    parser.add_argument("--training", action="store_true", help="what a training step keeps of activations instead")


def _add_embed(commands: Commands) -> None:
    parser = commands.add_parser("embed", help="an existing model's MHA, GQA or MQA with rotary embedding as exact MLA")
    parser.set_defaults(run=_embed)
    parser.add_argument("config", metavar="CONFIG", help="a config.json with transformers' names, or its folder")


def _add_golden(commands: Commands) -> None:
    parser = commands.add_parser(
        "golden",
        help="verify or regenerate the golden files, check a subject by them, or certify the reference in ball arithmetic",
    )
    parser.set_defaults(run=_golden)
    parser.add_argument("action", choices=("verify", "regenerate", "check", "certify"))
    parser.add_argument("subject", nargs="?", metavar="SUBJECT", help="to check, as for `mla-spec check`")
    parser.add_argument("--device", default="cpu", help="torch device of a check (cpu)")
    parser.add_argument("--json", metavar="FILE", help="also write the records of a check to FILE")
    parser.add_argument("--dir", metavar="DIR", help="the corpus to verify or regenerate (default: the installed one)")
    parser.add_argument("--cases", type=int, default=240, metavar="N", help="cases to certify (240)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases to certify (0)")


def _add_book(commands: Commands) -> None:
    parser = commands.add_parser(
        "book", help="write a page for each operation: its contract, its laws, the bugs they find"
    )
    parser.set_defaults(run=_book)
    parser.add_argument("folder", metavar="DIR", help="where the pages go; it is made if need be")


_COMMANDS = (
    _add_check,
    _add_explain,
    _add_merge,
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


def _check(options: argparse.Namespace) -> int:
    # Before numpy is imported: cases are so small that BLAS threads only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.check_command import check

    return check(options)


def _campaign(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.campaign_command import campaign

    return campaign(options)


def _merge(options: argparse.Namespace) -> int:
    from mla_spec.front.merge_command import merge

    return merge(options)


def _explain(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.explain_command import explain_case

    return explain_case(options)


def _soundness(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.proof.soundness import exit_code, report, run_soundness

    judged = run_soundness(
        options.cases,
        seed=options.seed,
        first=options.first,
        jobs=options.jobs,
        progress=lambda done: show_progress(f"{done}/{options.cases}"),
    )
    show_progress("")
    print(report(judged, options.seed))
    return exit_code(judged, options.cases)


def _sensitivity(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.device import require_device
    from mla_spec.proof.sensitivity import Sensitivity, report, sensitivity_card
    from mla_spec.subjects.find import UnknownSubject, resolve_subject

    require_device(options.device)

    def progress(row: Sensitivity) -> None:
        if options.records is not None:
            append_json(options.records, row.as_dict())
        show_progress(f"{row.dtype} {row.fault}")

    try:
        rows = sensitivity_card(
            resolve_subject(options.subject),
            dtypes=options.dtype,
            count=options.cases,
            seed=options.seed,
            device=options.device,
            progress=progress,
        )
    except (ValueError, UnknownSubject) as error:
        raise UsageError(str(error)) from error
    show_progress("")
    print(report(rows))
    if options.json is not None:
        write_json(options.json, [row.as_dict() for row in rows])
    return 0


def _selftest(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.selftest_command import selftest

    return selftest(options)


def _coverage(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.coverage_command import coverage

    return coverage(options)


def _laws(options: argparse.Namespace) -> int:
    from mla_spec.front.laws_report import hazard_exceptions
    from mla_spec.installed import all_laws
    from mla_spec.text.table import format_table

    print(format_table((law.name, ", ".join(law.needs), law.statement) for law in all_laws().values()))
    print(f"\n{hazard_exceptions()}")
    return 0


def _contract(options: argparse.Namespace) -> int:
    from mla_spec.front.contract_command import contract

    print(contract(options.operation))
    return 0


def _book(options: argparse.Namespace) -> int:
    from mla_spec.front.book import book

    return book(options)


def _profiles(options: argparse.Namespace) -> int:
    from mla_spec.front.profile_command import profiles

    print(profiles())
    return 0


def _profile(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.profile_command import propose

    return propose(options)


def _signatures(options: argparse.Namespace) -> int:
    from mla_spec.front.signatures_command import signatures

    print(signatures())
    return 0


def _adapters(options: argparse.Namespace) -> int:
    from mla_spec.front.adapters_command import adapters

    print(adapters())
    return 0


def _new(options: argparse.Namespace) -> int:
    from mla_spec.front.signatures_command import new

    print(new(options.signature, options.kernel), end="")
    return 0


def _models(options: argparse.Namespace) -> int:
    from mla_spec.reference.published import published_models
    from mla_spec.text.table import format_table

    rows = [("model", "layers", "heads", "q rank", "kv rank", "nope/rope/v", "verified")]
    for model in published_models().values():
        if not model.is_mla:
            continue
        f = {key: "?" if value is None else str(value) for key, value in model.fields.items()}
        unsure = "no" if not model.verified else "yes" + (", but not " * bool(model.unverified_fields))
        rows.append(
            (
                model.name,
                f["num_mla_layers"],
                f["num_attention_heads"],
                "-" if model.fields["q_lora_rank"] is None else f["q_lora_rank"],
                f["kv_lora_rank"],
                f"{f['qk_nope_head_dim']}/{f['qk_rope_head_dim']}/{f['v_head_dim']}",
                unsure + "; ".join(model.unverified_fields if model.verified else ()),
            )
        )
    print(format_table(rows))
    return 0


def _cache(options: argparse.Namespace) -> int:
    from mla_spec.front.cache_report import cache_report

    try:
        if options.training:
            print(_training(options))
            return 0
        sizes = options.tokens, options.batch, options.page_size
        print(cache_report(options.model, options.dtype, *sizes, layout=options.layout, tensor_parallel=options.tp))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _embed(options: argparse.Namespace) -> int:
    from mla_spec.front.embed_report import embed_report

    try:
        print(embed_report(options.config))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _training(options: argparse.Namespace) -> str:
    from mla_spec.front.activation_report import activation_report

    of_a_cache = {
        "--layout": options.layout is not None,
        "--page-size": options.page_size != 1,
        "--tp": options.tp != 1,
    }
    for name in (name for name, given in of_a_cache.items() if given):
        raise ValueError(f"{name} is of a cache, which --training does not print")
    return activation_report(options.model, options.dtype, options.tokens, options.batch)


def _golden(options: argparse.Namespace) -> int:
    if (options.subject is not None) != (options.action == "check"):
        raise UsageError(f"golden {options.action} takes {'one' if options.action == 'check' else 'no'} SUBJECT")
    if options.action == "certify":
        return _certify(options)
    corpus = installed.golden_corpus()
    if options.action == "check":
        return _golden_check(options, corpus.CorpusError)
    try:
        print(getattr(corpus, options.action)(options.dir))
    except corpus.CorpusError as error:
        print(f"mla-spec: {error}", file=sys.stderr)
        return 1
    return 0


def _golden_check(options: argparse.Namespace, corpus_error: type[Exception]) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.front.report import exit_code, report_of
    from mla_spec.judging.law import Options
    from mla_spec.subjects.find import UnknownSubject, resolve_subject

    laws = installed.golden_laws()
    try:
        subject = resolve_subject(options.subject)
        records = laws.check_golden(subject, options.dir, Options(device=options.device))
    except UnknownSubject as error:
        raise UsageError(str(error)) from error
    except corpus_error as error:
        print(f"mla-spec: {error}", file=sys.stderr)
        return 1
    print(report_of(records))
    for name, catches in laws.catches(records, options.dir).items():
        print(f"\n{name} catches: {catches}")
    if options.json is not None:
        write_json(options.json, [record.as_dict() for record in records])
    return exit_code(records)


def _certify(options: argparse.Namespace) -> int:
    try:
        golden = installed.certification()
    except ModuleNotFoundError as error:
        if error.name != "flint":
            raise
        raise UsageError(
            "certifying needs python-flint, which is not installed: pip install 'mla-spec[golden]'"
        ) from error
    summaries = golden.certification(options.cases, options.seed, progress=show_progress)
    print(golden.report(summaries))
    return 0 if all(summary.certified for summary in summaries) else 1


if __name__ == "__main__":
    sys.exit(main())
