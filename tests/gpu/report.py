"""Renders what the lane found: ``python tests/gpu/report.py [RESULTS ...] --markdown docs/hardware.md``.

Without RESULTS those of ``tests/gpu/results`` are taken, each the ``results.jsonl`` of one run. ``causes.json`` says why a
law does not hold, where that is known: {"step test_name[subject]": "whose fault it is, and why"}.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CAUSES = HERE / "causes.json"
VERDICTS = ("pass", "fail", "crashed", "incomplete", "unsupported")
FOUND = ("fail", "crashed", "incomplete")
UNKNOWN = "not known yet"

Result = dict[str, Any]


class BadResults(Exception):
    """A file is not what the lane wrote; the text says which, and why."""


def read(path: Path) -> list[Result]:
    """The lines of a run: what it was, and one a step. A last line that is not whole is left out.

    Raises:
        BadResults: the file does not begin with a run, or a line lacks a field.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found: list[Result] = [json.loads(line) for line in lines]
    if not found or "run" not in found[0]:
        raise BadResults(f"{path} does not begin with a line of the run")
    for line in found[1:]:
        missing = {"step", "title", "command", "status", "records", "seconds", "expected"} - set(line)
        if missing:
            raise BadResults(f"{path}: a step lacks {', '.join(sorted(missing))}")
    return found


def page(runs: list[list[Result]], causes: dict[str, str]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    if not runs:
        parts.append("Not run on hardware yet.")
    for run in runs:
        parts += run_section(run, causes)
    return "\n\n".join([*parts, HOW_TO]) + "\n"


INTRODUCTION = """# On hardware

What was run on a GPU by `tests/gpu/lane.py`, what came of it, and how long it took. `tests/gpu/report.py` writes this page."""

HOW_TO = """## How it is run

On a machine with network, bring third-party kernels along, of which nothing is committed:

```sh
python tests/gpu/collect.py tests/gpu/brought --flashinfer
```

On the machine with the GPU, from the root of the repository, with Python, torch, Triton, numpy, hypothesis and pytest there, and
nothing installed or fetched:

```sh
python3 tests/gpu/lane.py --device cuda --limit 540 --out "$OUT"
```

It takes nine minutes at most. `$OUT/results.jsonl` has a line for each step, `$OUT/records.jsonl` every record, `$OUT/lane.log`
what was printed. `--step NAME` runs one step, and `--rehearse --device cpu` all of them in small. Then keep the results, and
write this page:

```sh
cp "$OUT/results.jsonl" tests/gpu/results/NAME.jsonl && python tests/gpu/report.py --markdown docs/hardware.md
```

Each law that does not hold gets its cause in `tests/gpu/causes.json`, once it is known who is wrong: subject, profile, bound or
reference."""


def run_section(run: list[Result], causes: dict[str, str]) -> Iterator[str]:
    """Heading, machine, table of steps, and what was found."""
    about, steps = run[0]["run"], run[1:]
    machine = next((step.get("data") for step in steps if step["step"] == "machine"), None) or {}
    title = machine.get("GPU", about["device"])
    yield f"## {title}, {about['date']}" + (" (rehearsal)" if about["rehearsal"] else "")
    if machine:
        yield table([("what", "value"), *((name, str(value)) for name, value in machine.items())])
    yield "### What ran"
    yield table([("step", "subject", *VERDICTS, "s"), *(row for step in steps for row in rows_of(step))])
    for render in (products, sensitivity, selftest):
        yield from (text for step in steps if (text := render(step)))
    yield from findings(steps, causes)
    yield from doubts(steps, causes)


def rows_of(step: Result) -> Iterator[tuple[str, ...]]:
    """A row for each subject of a step, or one that says why there is none."""
    counts: dict[str, Counter[str]] = {}
    for record in step["records"]:
        if "verdict" in record:
            counts.setdefault(record["subject"], Counter())[record["verdict"]] += 1
    seconds = f"{step['seconds']:.0f}" if step["status"] != "left out" else ""
    if not counts or step["status"] not in ("done", "killed"):
        yield step["title"], said(step), *("" for _ in VERDICTS), seconds
        return
    for i, (subject, count) in enumerate(counts.items()):
        title = step["title"] + (f" ({said(step)})" if step["status"] == "killed" else "") if i == 0 else ""
        yield title, subject, *(str(count[verdict]) for verdict in VERDICTS), seconds if i == 0 else ""


def said(step: Result) -> str:
    """The status of a step, with its reason."""
    code = step.get("exit")
    reason = step.get("reason") or (f"exit code {code}" if code and not step["records"] else "")
    return f"{step['status']}: {reason}" if reason else str(step["status"])


def products(step: Result) -> str:
    """How many fraction bits the products of each format kept."""
    if step["step"] != "products" or not step.get("data"):
        return ""
    orders = list(dict.fromkeys(order for kept in step["data"].values() for order in kept))
    rows = [(name, *(str(kept[order]) for order in orders)) for name, kept in step["data"].items()]
    text = "Fraction bits that a product of matrices keeps of x, by the order of its terms; the profiles declare 25 in 16 bits:"
    return f"### {step['title']}\n\n{text}\n\n{table([('format', *orders), *rows])}"


def sensitivity(step: Result) -> str:
    if step["step"] != "sensitivity" or not step["records"]:
        return ""
    rows = [
        (r["fault"].format("x"), r["dtype"], "none" if r["smallest"] is None else str(r["smallest"]) or "yes", r["law"])
        for r in step["records"]
    ]
    return f"### {step['title']}\n\n{table([('fault', 'dtype', 'smallest detected', 'law'), *rows])}"


def selftest(step: Result) -> str:
    if step["step"] != "selftest" or not step["records"]:
        return ""
    survivors = [record["bug"] for record in step["records"] if not record["killed"]]
    count = len(step["records"])
    return (
        f"### {step['title']}\n\n{count - len(survivors)} of {count} planted bugs that ran were killed; "
        f"surviving: {', '.join(survivors) or 'none'}."
    )


def found_in(steps: list[Result]) -> Iterator[tuple[Result, Result]]:
    """Each law that was not found to hold, with its step."""
    for step in steps:
        for record in step["records"]:
            if record.get("verdict") in FOUND:
                yield step, record


def cause_of(step: Result, record: Result, causes: dict[str, str]) -> str:
    name = f"{step['step']} {record['law']}[{record['subject']}]"
    expected = f"expected: {step['expected']}"
    return causes.get(name) or (expected if step["expected"] and record["verdict"] == "fail" else UNKNOWN)


def findings(steps: list[Result], causes: dict[str, str]) -> Iterator[str]:
    """The text of each law that was not found to hold, its cause, and the command that runs it again."""
    texts = []
    for step, record in found_in(steps):
        lines = "\n".join(f"  {line}" for line in record["message"].splitlines())
        replay = f"\n  replay: {record['replay']}" if record.get("replay") else ""
        texts.append(
            f"`{step['step']}`: {record['law']} [{record['subject']}]: {record['verdict']}. "
            f"Cause: {cause_of(step, record, causes)}.\n\n```\n{lines}{replay}\n```"
        )
    if texts:
        yield "### What did not hold, or could not be judged"
        yield from texts


def doubts(steps: list[Result], causes: dict[str, str]) -> Iterator[str]:
    """What a reader cannot rely on."""
    unknown = sum(cause_of(step, record, causes) == UNKNOWN for step, record in found_in(steps))
    items = [f"- {step['title']}: {said(step)}." for step in steps if said(step) != "done"]
    if unknown:
        items.append(f"- {unknown} laws that did not hold have no known cause.")
    yield "### Doubts"
    yield "\n".join(items) if items else "None is known."


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as a Markdown table; the first is the heading."""
    head, *body = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page to FILE instead of printing it")
    options = parser.parse_args()
    try:
        runs = [read(path) for path in options.results or sorted(RESULTS.glob("*.jsonl"))]
    except (BadResults, OSError, ValueError) as error:
        parser.error(str(error))
    text = page(runs, json.loads(CAUSES.read_text(encoding="utf-8")))
    if options.markdown is None:
        print(text, end="")
    else:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
