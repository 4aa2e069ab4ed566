"""The command ``mla-spec``. Exit codes: 0 conforms, 1 violates, 2 usage, 3 incomplete."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mla_spec import __version__


class UsageError(Exception):
    """The command cannot be carried out as given; the text is one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
        run: Any = options.run
        return int(run(options))
    except UsageError as error:
        print(f"mla-spec: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mla-spec", description="Conformance suite for Multi-head Latent Attention.")
    parser.add_argument("--version", action="version", version=f"mla-spec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    check = commands.add_parser("check", help="run the laws on implementations")
    check.set_defaults(run=_check)
    check.add_argument(
        "subjects",
        nargs="*",
        metavar="SUBJECT",
        help="a shipped name, package.module:object or file.py:object; default: all that can run here",
    )
    check.add_argument("--signature", metavar="OPERATION", help="the operation a bare function implements")
    check.add_argument("--law", action="append", default=[], metavar="NAME", help="only this law; repeatable")
    check.add_argument("--case", metavar="ID", help="run this one case (with one --law)")
    check.add_argument("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable")
    check.add_argument("--device", default="cpu", help="torch device (cpu)")
    check.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch on the CPU (1)")
    check.add_argument("--examples", type=int, default=100, metavar="N", help="generated cases per law (100)")
    check.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the generation (0)")
    check.add_argument("--json", metavar="FILE", help="also write the records to FILE")

    laws = commands.add_parser("laws", help="list the laws")
    laws.set_defaults(run=_laws)

    models = commands.add_parser("models", help="list the published MLA models")
    models.set_defaults(run=_models)

    cache = commands.add_parser("cache", help="exact cache sizes of a published model")
    cache.set_defaults(run=_cache)
    cache.add_argument("model")
    cache.add_argument("--dtype", default="bfloat16", help="of the cache (bfloat16)")
    cache.add_argument("--tokens", type=int, default=1, metavar="N", help="tokens per sequence (1)")
    cache.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    cache.add_argument("--page-size", type=int, default=1, metavar="N", help="tokens per page (1)")

    golden = commands.add_parser("golden", help="verify or regenerate the golden files")
    golden.set_defaults(run=_golden)
    golden.add_argument("action", choices=("verify", "regenerate"))
    golden.add_argument("--dir", metavar="DIR", help="the corpus (default: the installed one)")
    return parser


def _check(options: argparse.Namespace) -> int:
    # Before numpy is imported: cases are so small that BLAS threads only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_spec.harness.cases import parse_case
    from mla_spec.harness.check import check_subject, find_laws
    from mla_spec.harness.contract import DTYPES
    from mla_spec.harness.laws import Options
    from mla_spec.harness.report import HEADER, describe_subject, exit_code, format_table, record_row, summary
    from mla_spec.harness.subjects import UnknownSubject, available_subjects, resolve_subject

    for name in ("examples", "threads"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}")
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if options.case is not None and len(options.law) != 1:
        raise UsageError("--case needs exactly one --law")
    _require_device(options.device)
    try:
        laws = [made.name for made in find_laws(options.law)]
        case = None if options.case is None else parse_case(options.case)
        specs = options.subjects or available_subjects()
        subjects = [(spec, resolve_subject(spec, options.signature)) for spec in specs]
    except (ValueError, UnknownSubject) as error:
        raise UsageError(str(error)) from error

    everything = []
    for spec, subject in subjects:
        signature = () if options.signature is None else ("--signature", options.signature)
        settings = Options(
            examples=options.examples,
            seed=options.seed,
            device=options.device,
            threads=options.threads,
            dtypes=None if options.dtype is None else tuple(options.dtype),
            case=case,
            spec=(spec, *signature),
        )
        print(describe_subject(subject), flush=True)
        progress = _Progress(len(laws))
        records = check_subject(subject, laws=laws, options=settings, progress=progress)
        progress.clear()
        print(format_table([HEADER, *(record_row(record) for record in records)]))
        for record in records:
            if record.verdict not in ("pass", "unsupported"):
                print("\n" + record.text())
        print(f"\n{summary(records)} in {sum(r.seconds for r in records):.1f} s\n", flush=True)
        everything += records
    if options.json is not None:
        _write_json(options.json, [record.as_dict() for record in everything])
    return exit_code(everything)


class _Progress:
    """Names the law that has just run, on a terminal only."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, record: Any) -> None:
        self.done += 1
        if sys.stderr.isatty():
            print(f"\r\x1b[K[{self.done}/{self.total}] {record.law}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _require_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _write_json(path: str, content: Any) -> None:
    from mla_spec.harness.files import write_atomically

    try:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _laws(options: argparse.Namespace) -> int:
    from mla_spec.harness.laws import all_laws
    from mla_spec.harness.report import format_table

    print(format_table((made.name, ", ".join(made.needs), made.statement) for made in all_laws().values()))
    return 0


def _models(options: argparse.Namespace) -> int:
    from mla_spec.harness.report import format_table
    from mla_spec.reference.published import published_models

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
    from mla_spec.harness.cache_report import cache_report

    try:
        print(cache_report(options.model, options.dtype, options.tokens, options.batch, options.page_size))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _golden(options: argparse.Namespace) -> int:
    from importlib import import_module

    corpus = import_module("mla_spec.golden.corpus")
    try:
        print(getattr(corpus, options.action)(options.dir))
    except corpus.CorpusError as error:
        print(f"mla-spec: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
