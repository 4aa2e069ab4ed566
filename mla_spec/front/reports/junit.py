"""A report as JUnit XML: a suite for each subject, a case for each law in each dtype."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable

from mla_spec.front.reports.account import Account, Document, declared_rows, environment_rows
from mla_spec.front.reports.heat import excess
from mla_spec.judging.causes import needs
from mla_spec.judging.verdict import Record
from mla_spec.text.terminal import printable


def junit(document: Document) -> str:
    """The document: crashed and incomplete laws are errors, those that do not apply or are waived are skipped."""
    root = ET.Element("testsuites", {"name": "mla-spec"})
    for account in document.accounts:
        root.append(_suite(account, document))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(account: Account, document: Document) -> ET.Element:
    cases = [_case(record) for _, record in account.cells]
    suite = ET.Element("testsuite", {"name": printable(account.subject.name), "tests": str(len(cases))})
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("time", f"{account.seconds:.3f}")
    suite.set("timestamp", printable(document.header.started))
    suite.append(_properties([*environment_rows(document), *declared_rows(account.subject)]))
    suite.extend(cases)
    return suite


def _properties(rows: Iterable[tuple[str, str]]) -> ET.Element:
    properties = ET.Element("properties")
    for name, value in rows:
        ET.SubElement(properties, "property", {"name": printable(name), "value": printable(value)})
    return properties


def _case(record: Record) -> ET.Element:
    operation = next(iter(needs(record)), "other")
    name = f"{record.law}[{record.dtype}]" if record.dtype else record.law
    case = ET.Element("testcase", {"classname": f"mla_spec.{operation}", "name": printable(name)})
    case.set("time", f"{record.seconds:.3f}")
    ratio = excess(record)
    rows = [
        ("dtype", record.dtype),
        ("cases", str(record.cases)),
        ("error/bound", "" if ratio is None else repr(ratio)),
        ("worst case", record.worst_case),
        ("smallest case", record.case),
        ("replay", record.replay),
        ("note", record.note),
    ]
    case.append(_properties((name, value) for name, value in rows if value))
    tag = _outcome(record)
    if tag:
        text = printable(record.message, 4000)
        reason = (
            f"waived: {printable(record.waived)}" if record.waived else next(iter(text.splitlines()), record.verdict)
        )
        outcome = ET.SubElement(
            case, tag, {"message": reason, **({} if tag == "skipped" else {"type": record.verdict})}
        )
        outcome.text = text
    return case


def _outcome(record: Record) -> str:
    """The element that says what came of a law; empty where it holds."""
    if record.verdict == "pass":
        return ""
    return "skipped" if record.holds else "failure" if record.verdict == "fail" else "error"
