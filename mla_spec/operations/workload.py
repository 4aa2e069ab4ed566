"""Calls recorded elsewhere, as cases: a file of JSON objects, one a line, or a folder of recorded calls.

    {"operation": "decode", "seqlens": [8192, 3071], "s": 1, "num_heads": 128, "page_size": 64}

``FIELDS`` lists the fields of each operation; those with a default may be absent. Shapes alone are recorded: values come from
the seed. Empty lines count nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.operations.case import Case
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.quantised_cache import HEAD_DIM_V
from mla_spec.operations.quantised_decode import QuantisedDecodeCase
from mla_spec.operations.recorded_shapes import recorded_shapes
from mla_spec.operations.sparse import SparseDecodeCase
from mla_spec.text.files import read_text

ELEMENTS: Final = 2**24
"""Of one argument in float64, at most. A pool that would be larger is shared: sequences name the same pages."""

REQUIRED: Final = object()
"""The default of a field that must be there."""


class WorkloadError(ValueError):
    """A line is no case; the text is one sentence that names the line, the value and what was expected."""


@dataclass(frozen=True)
class Field:
    """A field of a line.

    Attributes:
        expected: for people.
        accepts: whether a JSON value will do.
        default: the value where the field is absent, or ``REQUIRED``.
    """

    expected: str
    accepts: Callable[[Any], bool]
    default: Any = REQUIRED


def _integer(least: int, default: Any = REQUIRED) -> Field:
    return Field(f"an integer of at least {least}", lambda x: type(x) is int and least <= x < 2**31, default)


def _lengths(default: Any = REQUIRED) -> Field:
    def accepts(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(type(n) is int and 0 <= n < 2**31 for n in x)

    return Field("a list of one or more integers, none negative", accepts, default)


def _flag(default: bool) -> Field:
    return Field("true or false", lambda x: isinstance(x, bool), default)


def _one_of(*names: str) -> Field:
    return Field(f"one of {', '.join(names)}", lambda x: x in names, names[0])


FIELDS: Final[dict[str, dict[str, Field]]] = {
    "decode": {
        "seqlens": _lengths(),
        "s": _integer(1, 1),
        "num_heads": _integer(1),
        "kv_lora_rank": _integer(1, 512),
        "qk_rope_head_dim": _integer(0, 64),
        "page_size": _integer(1, 64),
        "causal": _flag(True),
    },
    "prefill": {
        "seqlens_q": _lengths(),
        "seqlens_k": _lengths(None),
        "num_heads": _integer(1),
        "qk_head_dim": _integer(1, 192),
        "v_head_dim": _integer(1, 128),
        "causal": _flag(True),
    },
    "decode_quantized": {
        "seqlens": _lengths(),
        "s": _integer(1, 1),
        "num_heads": _integer(1),
        "page_size": _integer(1, 64),
        "format": _one_of("fp8_ds_mla", *(name for name in HEAD_DIM_V if name != "fp8_ds_mla")),
        "causal": _flag(True),
    },
    "sparse_decode": {
        "batch": _integer(1),
        "s": _integer(1, 1),
        "num_heads": _integer(1),
        "kv_lora_rank": _integer(1, 512),
        "qk_rope_head_dim": _integer(0, 64),
        "page_size": _integer(1, 64),
        "pages": _integer(1, 64),
        "topk": _integer(1, 2048),
    },
}
"""The fields of each operation, beside "operation"."""


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
        cases = tuple(_case(json.dumps(entry), f"{path}/{name}") for name, entry in recorded_shapes(path, FIELDS))
    except ExchangeError as error:
        raise WorkloadError(str(error)) from error
    if not cases:
        raise WorkloadError(f"{path}: holds no recorded call of {', '.join(FIELDS)}")
    return cases


def _case(line: str, where: str) -> Case:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(entry, dict):
        raise WorkloadError(f"{where}: {_shown(entry)} is no JSON object")
    operation = entry.pop("operation", None)
    if not isinstance(operation, str) or operation not in FIELDS:
        raise WorkloadError(f"{where}: operation is {_shown(operation)}; expected one of {', '.join(FIELDS)}")
    known = FIELDS[operation]
    for name in entry:
        if name not in known:
            raise WorkloadError(f"{where}: {operation} has no field {name!r}; expected some of {', '.join(known)}")
    values = {name: _value(field, name, entry, where) for name, field in known.items()}
    case = _MAKE[operation](where, **values)
    _require_size(case, where)
    return case


def _value(field: Field, name: str, entry: dict[str, Any], where: str) -> Any:
    if name not in entry:
        if field.default is REQUIRED:
            raise WorkloadError(f"{where}: {name} is missing; expected {field.expected}")
        return field.default
    if not field.accepts(entry[name]):
        raise WorkloadError(f"{where}: {name} is {_shown(entry[name])}; expected {field.expected}")
    return tuple(entry[name]) if isinstance(entry[name], list) else entry[name]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shared(lengths: tuple[int, ...], page_size: int, width: int) -> int:
    """How many pages sequences share, so that a pool stays below ``ELEMENTS``; 0 where each can have its own."""
    room = max(ELEMENTS // (page_size * width), 1)
    return 0 if sum(-(-n // page_size) for n in lengths) <= room else room


def _decode(where: str, **values: Any) -> Case:
    width = values["kv_lora_rank"] + values["qk_rope_head_dim"]
    return DecodeCase(dtype="float32", shared_pages=shared(values["seqlens"], values["page_size"], width), **values)


def _decode_quantized(where: str, **values: Any) -> Case:
    case = QuantisedDecodeCase(dtype="float32", logit_std=0.1, power_of_two=True, **values)
    own = shared(case.seqlens, case.page_size, case.layout.width)
    return QuantisedDecodeCase(dtype="float32", logit_std=0.1, power_of_two=True, shared_pages=own, **values)


def _prefill(where: str, **values: Any) -> Case:
    keys, queries = values.pop("seqlens_k"), values["seqlens_q"]
    keys = queries if keys is None else keys
    if len(keys) != len(queries):
        raise WorkloadError(
            f"{where}: seqlens_k is {_shown(list(keys))}; expected as many lengths as seqlens_q has, {len(queries)}"
        )
    return PrefillCase(dtype="float32", seqlens_k=keys, **values)


def _sparse_decode(where: str, **values: Any) -> Case:
    return SparseDecodeCase(dtype="float32", **values)


_MAKE: Final[dict[str, Callable[..., Case]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "decode_quantized": _decode_quantized,
    "sparse_decode": _sparse_decode,
}


def elements(case: Case) -> dict[str, int]:
    """Elements of what sequences of a case cannot share, by name."""
    if isinstance(case, PrefillCase):
        row = case.num_heads * case.qk_head_dim
        return {"queries": sum(case.seqlens_q) * row, "keys": sum(case.seqlens_k) * row}
    if isinstance(case, SparseDecodeCase):
        width, slots = case.kv_lora_rank + case.qk_rope_head_dim, case.pages * case.page_size
        rows = case.batch * case.s
        return {
            "queries": rows * case.num_heads * width,
            "pages": slots * width,
            "indices": rows * max(case.topk, slots),
        }
    assert isinstance(case, DecodeCase | QuantisedDecodeCase)
    width = case.layout.width if isinstance(case, QuantisedDecodeCase) else case.kv_lora_rank + case.qk_rope_head_dim
    queries = len(case.seqlens) * case.s * case.num_heads * width
    return {"queries": queries, "keys of one sequence": max(case.seqlens) * width}


def _require_size(case: Case, where: str) -> None:
    for what, count in elements(case).items():
        if count > 2 * ELEMENTS:
            raise WorkloadError(
                f"{where}: {what} have {count} elements; expected at most {2 * ELEMENTS}, which a host can hold"
            )
