"""Calls recorded elsewhere, as cases: a file of JSON objects, one a line, or a folder of recorded calls.

    {"operation": "decode", "seqlens": [8192, 3071], "s": 1, "num_heads": 128, "page_size": 64}

An operation's ``workload`` says which fields its lines have; those with a default may be absent. Shapes alone are recorded: values come from
the seed. Empty lines count nothing.
"""

from __future__ import annotations

import json
import os
from typing import Final

from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.operations.all import CALLED
from mla_spec.operations.case import Case
from mla_spec.operations.recorded_shapes import recorded_shapes
from mla_spec.operations.workload_line import ELEMENTS, shown_json
from mla_spec.text.files import read_text

LINES: Final = {operation.name: operation.workload for operation in CALLED if operation.workload is not None}
"""By operation, what a line holds."""


class WorkloadError(ValueError):
    """A line is no case; the text is one sentence that names the line, the value and what was expected."""


def read_workload(path: str) -> tuple[Case, ...]:
    """The cases of a file, in its order, or of the calls in a folder; their dtype means nothing.

    Raises:
        WorkloadError: the file cannot be read or is empty, or a line is no case or larger than a host should hold.
    """
    if os.path.isdir(path):
        return _of_folder(path)
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    cases = tuple(_case(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if not cases:
        raise WorkloadError(f"{path}: holds no line; expected one JSON object a line")
    return cases


def _of_folder(path: str) -> tuple[Case, ...]:
    try:
        cases = tuple(
            _case(json.dumps(entry), f"{path}/{name}")
            for name, entry in recorded_shapes(path, {name: line.fields for name, line in LINES.items()})
        )
    except ExchangeError as error:
        raise WorkloadError(str(error)) from error
    if not cases:
        raise WorkloadError(f"{path}: holds no recorded call of {', '.join(LINES)}")
    return cases


def _case(line: str, where: str) -> Case:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(entry, dict):
        raise WorkloadError(f"{where}: {shown_json(entry)} is no JSON object")
    operation = entry.pop("operation", None)
    if not isinstance(operation, str) or operation not in LINES:
        raise WorkloadError(f"{where}: operation is {shown_json(operation)}; expected one of {', '.join(LINES)}")
    known = LINES[operation]
    for name in entry:
        if name not in known.fields:
            expected = ", ".join(known.fields)
            raise WorkloadError(f"{where}: {operation} has no field {name!r}; expected some of {expected}")
    try:
        case = known.case(**{name: field.value(name, entry) for name, field in known.fields.items()})
    except ValueError as error:
        raise WorkloadError(f"{where}: {error}") from error
    for what, count in known.elements(case).items():
        if count > 2 * ELEMENTS:
            raise WorkloadError(
                f"{where}: {what} have {count} elements; expected at most {2 * ELEMENTS}, which a host can hold"
            )
    return case
