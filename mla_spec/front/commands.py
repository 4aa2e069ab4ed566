"""What each command of ``mla-spec`` does: from parsed options to an exit code. What it needs is loaded when it runs."""

from __future__ import annotations

import argparse
import sys

from mla_spec import installed
from mla_spec.text.terminal import UsageError, append_json, show_progress, write_json


def run_check(options: argparse.Namespace) -> int:
    from mla_spec.judging.copies import begin_imports

    if not options.in_process:
        begin_imports()
    from mla_spec.front.check_command import check

    return check(options)


def run_export(options: argparse.Namespace) -> int:
    from mla_spec.front.exchange_command import export

    return export(options)


def run_answer(options: argparse.Namespace) -> int:
    from mla_spec.front.exchange_command import answer

    return answer(options)


def run_judge(options: argparse.Namespace) -> int:
    from mla_spec.front.exchange_command import judge

    return judge(options)


def run_replay(options: argparse.Namespace) -> int:
    from mla_spec.front.replay_command import replay

    return replay(options)


def run_campaign(options: argparse.Namespace) -> int:
    from mla_spec.front.campaign_command import campaign

    return campaign(options)


def run_merge(options: argparse.Namespace) -> int:
    from mla_spec.front.merge_command import merge

    return merge(options)


def run_report(options: argparse.Namespace) -> int:
    from mla_spec.front.report_command import report

    return report(options)


def run_diff(options: argparse.Namespace) -> int:
    from mla_spec.front.diff_command import diff

    return diff(options)


def run_dump(options: argparse.Namespace) -> int:
    from mla_spec.front.dump_command import dump

    return dump(options)


def run_statement(options: argparse.Namespace) -> int:
    from mla_spec.front.statement_command import state

    return state(options)


def run_map(options: argparse.Namespace) -> int:
    from mla_spec.front.map_command import chart

    return chart(options)


def run_explain(options: argparse.Namespace) -> int:
    from mla_spec.front.explain_command import explain_case

    return explain_case(options)


def run_soundness(options: argparse.Namespace) -> int:
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


def run_sensitivity(options: argparse.Namespace) -> int:
    from mla_spec.front.device import require_device
    from mla_spec.proof.sensitivity import Sensitivity, report, sensitivity_card
    from mla_spec.subjects.process import apart
    from mla_spec.subjects.violation import SubjectCrashed, UnknownSubject

    require_device(options.device)

    def progress(row: Sensitivity) -> None:
        if options.records is not None:
            append_json(options.records, row.as_dict())
        show_progress(f"{row.dtype} {row.fault}")

    try:
        with apart(options.subject, options.device) as subject:
            rows = sensitivity_card(
                subject,
                dtypes=options.dtype,
                count=options.cases,
                seed=options.seed,
                laws=options.law,
                device=options.device,
                progress=progress,
            )
    except (ValueError, UnknownSubject, SubjectCrashed) as error:
        raise UsageError(str(error)) from error
    show_progress("")
    print(report(rows))
    if options.json is not None:
        write_json(options.json, [row.as_dict() for row in rows])
    return 0


def run_selftest(options: argparse.Namespace) -> int:
    from mla_spec.front.selftest_command import selftest

    return selftest(options)


def run_coverage(options: argparse.Namespace) -> int:
    from mla_spec.front.coverage_command import coverage

    return coverage(options)


def run_laws(options: argparse.Namespace) -> int:
    from mla_spec.front.laws_report import hazard_exceptions
    from mla_spec.judging.check import find_laws
    from mla_spec.text.table import format_table

    laws = find_laws([], quick=options.quick)
    print(format_table((law.name, ", ".join(law.needs), law.statement) for law in laws))
    if not options.quick:
        print(f"\n{hazard_exceptions()}")
    return 0


def run_contract(options: argparse.Namespace) -> int:
    from mla_spec.front.contract_command import contract

    print(contract(options.operation))
    return 0


def run_book(options: argparse.Namespace) -> int:
    from mla_spec.front.book import book

    return book(options)


def run_profiles(options: argparse.Namespace) -> int:
    from mla_spec.front.profile_command import profiles

    print(profiles())
    return 0


def run_profile(options: argparse.Namespace) -> int:
    from mla_spec.front.profile_command import propose

    return propose(options)


def run_signatures(options: argparse.Namespace) -> int:
    from mla_spec.front.signatures_command import signatures

    print(signatures())
    return 0


def run_adapters(options: argparse.Namespace) -> int:
    from mla_spec.front.adapters_command import adapters

    print(adapters())
    return 0


def run_new(options: argparse.Namespace) -> int:
    from mla_spec.front.signatures_command import new

    print(new(options.signature, options.kernel), end="")
    return 0


def run_models(options: argparse.Namespace) -> int:
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


def run_cache(options: argparse.Namespace) -> int:
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


def run_embed(options: argparse.Namespace) -> int:
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


def run_golden(options: argparse.Namespace) -> int:
    if (options.subject is not None) != (options.action == "check"):
        raise UsageError(f"golden {options.action} takes {'one' if options.action == 'check' else 'no'} SUBJECT")
    if options.calls is not None and (options.action != "regenerate" or options.dir is None):
        raise UsageError("--calls is of golden regenerate, into the corpus that --dir names")
    if options.action == "certify":
        return _certify(options)
    corpus = installed.golden_corpus()
    if options.action == "check":
        return _golden_check(options, corpus.CorpusError)
    try:
        made_of = {} if options.calls is None else {"calls": options.calls}
        print(getattr(corpus, options.action)(options.dir, **made_of))
    except corpus.CorpusError as error:
        print(f"mla-spec: {error}", file=sys.stderr)
        return 1
    return 0


def _golden_check(options: argparse.Namespace, corpus_error: type[Exception]) -> int:
    from mla_spec.front.report import exit_code, report_of
    from mla_spec.judging.law import Options
    from mla_spec.subjects.process import apart
    from mla_spec.subjects.violation import BrokenSubject, UnknownSubject

    laws = installed.golden_laws()
    try:
        with apart(options.subject, options.device) as subject:
            records = laws.check_golden(subject, options.dir, Options(device=options.device, isolated=True))
    except (UnknownSubject, BrokenSubject) as error:
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
