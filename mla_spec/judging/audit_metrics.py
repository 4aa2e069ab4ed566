"""The counts of an audit in the text format of Prometheus, for a collector that reads files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from mla_spec.judging.audit_counts import EDGES, Status, false_alarms

Labels = Mapping[str, str]


def metrics(status: Status) -> str:
    """The text of a file of metrics; every sample has the label ``subject``."""
    counts, subject = status.counts, {"subject": status.subject}
    totals = {
        "calls": ("Calls of the kernel.", status.calls),
        "taken": ("Calls of which rows were copied.", status.taken),
        "dropped": ("Copied calls that were not judged.", counts.dropped),
        "too_large": ("Calls of the sample that were too large to copy.", status.too_large),
    }
    lines: list[str] = []
    for name, (what, value) in totals.items():
        lines += _family(f"{name}_total", "counter", what, [("", subject, value)])
    judged = [
        ("", {**subject, "operation": operation, "verdict": verdict}, n)
        for (operation, verdict), n in sorted(counts.judged.items())
    ]
    lines += _family("judged_total", "counter", "Judged calls.", judged)
    by_kind = {"worst case": counts.proofs, "probable": counts.violations - counts.proofs}
    lines += _family(
        "violations_total",
        "counter",
        "Calls outside the bound of the declared arithmetic.",
        [("", {**subject, "bound": kind}, n) for kind, n in by_kind.items()],
    )
    lines += _family(
        "false_alarm_probability",
        "gauge",
        "Upper bound of the probability of any false alarm so far.",
        [("", subject, false_alarms(counts.held))],
    )
    lines += _family("stopped", "gauge", "1 where no more calls are taken.", [("", subject, int(bool(status.stopped)))])
    lines += _family("error_over_bound", "histogram", "Largest error / bound of a judged call.", _cells(status))
    return "\n".join(lines) + "\n"


def _cells(status: Status) -> Iterable[tuple[str, Labels, float]]:
    for (operation, output), margins in sorted(status.counts.margins.items()):
        labels = {"subject": status.subject, "operation": operation, "output": output}
        for edge, n in zip([*map(str, EDGES), "+Inf"], accumulate(margins.cells), strict=True):
            yield "_bucket", {**labels, "le": edge}, n
        yield "_sum", labels, margins.total
        yield "_count", labels, sum(margins.cells)


def _family(name: str, kind: str, what: str, samples: Iterable[tuple[str, Labels, float]]) -> list[str]:
    full = f"mla_spec_audit_{name}"
    lines = [f"# HELP {full} {what}", f"# TYPE {full} {kind}"]
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{full}{suffix}{{{inside}}} {value!r}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
