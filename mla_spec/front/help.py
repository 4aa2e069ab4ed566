"""What ``--help`` says below the options of a command: examples, and exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

_VERDICT = "0 conforms, 1 violates, 2 usage, 3 incomplete, 130 interrupted"

EXIT_CODES: Mapping[str, str] = {
    "check": _VERDICT,
    "explain": _VERDICT,
    "export": "0 the calls are written, 2 usage, 130 interrupted",
    "answer": "0 the answers are written, 2 usage, 130 interrupted",
    "judge": _VERDICT,
    "replay": _VERDICT,
    "merge": _VERDICT,
    "diff": "0 nothing got worse, 1 something did, 2 usage",
    "dump": "0 the file is written, 2 usage",
    "statement": _VERDICT,
    "map": "0 right or refused everywhere, 1 silently wrong somewhere, 2 usage, 3 nothing was judged, 130 interrupted",
    "report": "0 the report is written, whatever the verdict, 2 usage",
    "campaign": _VERDICT,
    "soundness": "0 no element outside its bound, 1 some are, 2 usage, 3 interrupted before all cases",
    "sensitivity": "0 the card is printed, 2 usage, 130 interrupted",
    "selftest": "0 every bug is killed, 1 some survive, 2 usage, 130 interrupted",
    "coverage": "0 every cell has a case or a reason, 1 some have neither, 2 usage, 130 interrupted",
    "laws": "0 the list is printed, 2 usage",
    "contract": "0 the contract is printed, 2 usage",
    "adapters": "0 the list is printed, 2 usage",
    "signatures": "0 the list is printed, 2 usage",
    "new": "0 the adapter is printed, 2 usage",
    "profiles": "0 the list is printed, 2 usage",
    "profile": "0 every dtype satisfies a preset, 1 some satisfy none, 2 usage, 130 interrupted",
    "models": "0 the list is printed, 2 usage",
    "cache": "0 the sizes are printed, 2 usage",
    "embed": "0 the dimensions are printed, 2 usage",
    "golden": "0 the files or the subject hold, 1 they do not, 2 usage, 3 incomplete, 130 interrupted",
    "book": "0 the pages are written, 2 usage",
}

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "check": (
        "mla-spec check my_kernel.py:Kernel",
        "mla-spec check my_kernel.py:Kernel --law decode --dtype bfloat16",
        "mla-spec check my_kernels.decode:flash_decode --signature decode",
        "mla-spec check my_kernels.decode:flash_decode --signature flash-mla",
        "mla-spec check my_kernel.py:Kernel --quick",
        "mla-spec check my_kernel.py:Kernel --law decode --export repro.py",
        "mla-spec check deepseek:path/to/model.py",
        "mla-spec check torch-absorbed --examples 10 --json report.json",
    ),
    "explain": (
        "mla-spec explain decode:dtype=float32,seqlens=65,page_size=64 my_kernel.py:Kernel",
        "mla-spec explain rope:dtype=float32,dim=64 my_kernel.py:Kernel --law test_rope_preserves_norm",
    ),
    "report": (
        "mla-spec report run.jsonl",
        "mla-spec report run.jsonl --format html -o report.html",
        "mla-spec report run.jsonl --format junit -o junit.xml",
        "mla-spec report run.jsonl --format github",
    ),
    "diff": ("mla-spec diff last.jsonl run.jsonl", "mla-spec diff last.jsonl run.jsonl --json changes.json"),
    "dump": ("mla-spec dump decode:dtype=bfloat16,seqlens=65,page_size=64 -o case.safetensors",),
    "statement": ("mla-spec statement run.jsonl -o conformance.md --badge badge.svg",),
    "export": (
        "mla-spec export calls --operation decode --examples 20",
        "mla-spec export calls --subject 'command:./my_program' --seed 0",
        "mla-spec export calls",
    ),
    "answer": ("mla-spec answer calls torch-absorbed", "mla-spec answer recorded my_kernel.py:Kernel --into again"),
    "judge": ("mla-spec judge calls", "mla-spec judge calls --law decode -v"),
    "replay": (
        "mla-spec replay recorded my_kernel.py:Kernel",
        "mla-spec replay flashinfer_dumps my_kernel.py:Kernel --into smallest --export repro.py",
        "mla-spec replay dumps my_kernel.py:Kernel --map names.toml",
    ),
    "map": (
        "mla-spec map my_kernel.py:Kernel --dtype bfloat16 -o envelope.html --json envelope.json",
        "mla-spec map torch-absorbed --operation prefill --dtype float32",
    ),
    "merge": ("mla-spec merge first.jsonl second.jsonl --json report.json",),
    "campaign": (
        "mla-spec campaign my_kernel.py:Kernel --hours 8",
        "mla-spec campaign torch-absorbed torch-sdpa --ray auto --records night.jsonl --corpus hardest.jsonl",
    ),
    "soundness": ("mla-spec soundness --cases 1000", "mla-spec soundness --first 17 --cases 1"),
    "sensitivity": ("mla-spec sensitivity torch-absorbed --dtype bfloat16 --cases 5",),
    "selftest": ("mla-spec selftest --bug K4", "mla-spec selftest --quick", "mla-spec selftest --explain 40"),
    "coverage": ("mla-spec coverage torch-absorbed --examples 400",),
    "laws": ("mla-spec laws", "mla-spec laws --quick"),
    "contract": ("mla-spec contract", "mla-spec contract decode"),
    "adapters": ("mla-spec adapters",),
    "signatures": ("mla-spec signatures",),
    "new": ("mla-spec new flash-mla", "mla-spec new sglang-decode --kernel my_kernels.decode:flash_decode"),
    "profiles": ("mla-spec profiles",),
    "profile": ("mla-spec profile my_kernel.py:Kernel", "mla-spec profile torch-absorbed --dtype bfloat16 --cases 20"),
    "models": ("mla-spec models",),
    "cache": (
        "mla-spec cache DeepSeek-V3 --tokens 4096 --tp 8",
        "mla-spec cache DeepSeek-V3 --training",
        "mla-spec cache path/to/config.json --layout fp8_ds_mla",
    ),
    "embed": ("mla-spec embed path/to/config.json",),
    "golden": (
        "mla-spec golden verify",
        "mla-spec golden check my_kernel.py:Kernel",
        "mla-spec golden regenerate --dir golden",
        "mla-spec golden regenerate --dir corpus --calls recorded",
    ),
    "book": ("mla-spec book docs/operations",),
}


def add_examples(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Give each command its examples and exit codes, below its options."""
    for name in EXAMPLES:
        parser = commands[name]
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        examples = "\n".join(f"  {line}" for line in EXAMPLES[name])
        parser.epilog = f"examples:\n{examples}\n\nexit codes: {EXIT_CODES[name]}"
