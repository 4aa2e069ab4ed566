"""A failing case as a script that needs torch and the kernel alone: for who has to mend it, and has no mla-spec."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mla_spec import __version__
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.exchange.call import Call
from mla_spec.installed import SHIPPED, operation_names
from mla_spec.judging.causes import needs
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import CALLED, parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Exactly, Expected, Operation, Within
from mla_spec.reference.typing import Array
from mla_spec.subjects.description import Description
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Tensors
from mla_spec.text.terminal import one_line, write_text

MOST = 4096
"""Numbers that are written out: more would fill pages of an issue."""

TRIED = 3
"""Values of a size that are tried, from the smallest."""

LONGEST = 40
"""Lines of a script."""


class NotExportable(Exception):
    """There is no such script; the text is a clause that says why."""


Again = Callable[[str, Case], Record]
"""Runs a law on one case of the subject."""


def export(path: str, text: Callable[[], str]) -> None:
    """Write a script to a file, or say on the standard error why there is none."""
    try:
        found = text()
    except NotExportable as error:
        print(f"mla-spec: --export: nothing is written: {error}", file=sys.stderr)
        return
    write_text(path, found)


def exported(
    records: Iterable[Record],
    declared: Description,
    spec: Sequence[str],
    again: Again | None = None,
    device: str = "cpu",
) -> str:
    """The script of the first failing record that one call on its smallest case shows.

    Args:
        spec: the arguments by which ``mla-spec check`` finds the subject.
        again: with it, cases with fewer heads, dims and slots are tried, which laws do not draw; None where that is not possible.

    Raises:
        NotExportable: no record can be shown so.
    """
    failing = [record for record in records if record.verdict in ("fail", "crashed") and record.case]
    why = [] if failing else ["no law fails"]
    for record in failing:
        try:
            _operation(record, parse_case(record.case))
            small = record if again is None else smaller(record, declared, again)
            return script(small, declared, spec, device)
        except NotExportable as error:
            why.append(str(error))
    raise NotExportable(why[0])


def smaller(record: Record, declared: Description, again: Again) -> Record:
    """The record of a case with fewer heads, dims and slots, where the subject takes any and it is wrong in the same way."""
    supports = declared.supports
    free = {
        "num_heads": supports.num_heads is None,
        "kv_lora_rank": supports.latent_dims is None,
        "qk_rope_head_dim": supports.latent_dims is None,
        "page_size": supports.page_sizes is None,
    }
    case = parse_case(record.case)
    defaults: dict[str, Any] = {f.name: f.default for f in fields(case)}
    for name in (name for name, allowed in free.items() if allowed and name in defaults):
        least = defaults[name]
        for value in range(least, min(getattr(case, name), least + TRIED)):
            sizes: dict[str, Any] = {name: value}
            tried = again(record.law, replace(case, **sizes))
            if _alike(tried, record):
                case, record = parse_case(tried.case), tried
                break
    return record


def _alike(one: Record, other: Record) -> bool:
    patterns = [[(each["what"], each["pattern"]) for each in record.evidence[:1]] for record in (one, other)]
    return one.verdict == other.verdict and bool(one.evidence) and patterns[0] == patterns[1]


def script(record: Record, declared: Description, spec: Sequence[str], device: str = "cpu") -> str:
    """The script of one failing record; NotExportable where one call on its case does not show the failure."""
    case = parse_case(record.case)
    operation = _operation(record, case)
    inputs = operation.build(case)
    expected = operation.expected(inputs, declared.profile(case.dtype), declared.supports)
    outputs = {
        output.name: _bounded(want)
        for output, want in zip(operation.outputs, expected, strict=True)
        if want is not None and output.offered(declared.supports)
    }
    _require_same(record, operation, outputs)
    head = _head(
        operation, record.message or record.verdict, f"{record.law} of mla-spec {__version__} on {case.short_id}"
    )
    return _lines(head, operation, inputs, case.dtype, outputs, declared, spec, device)


def script_of_call(call: Call, message: str, declared: Description, spec: Sequence[str], device: str = "cpu") -> str:
    """The script of a recorded call that fails; NotExportable where it is too long, or does not follow from its arguments."""
    operation = call.signature
    assert isinstance(operation, Operation) and operation.recorded is not None
    dtype = str(call.tensors["q"].dtype).removeprefix("torch.") if "q" in call.tensors else ""
    if dtype not in TORCH_DTYPES or operation.probable is None:
        raise NotExportable(f"a recorded call of {operation.name} is not shown by a script")
    inputs = operation.recorded(call.inputs())
    wants = operation.probable(inputs, declared.profile(dtype), declared.supports, FAILURE_PROBABILITY)
    outputs = {
        output.name: _bounded(want)
        for output, want in zip(operation.outputs, wants, strict=True)
        if want is not None and output.offered(declared.supports)
    }
    head = _head(operation, message, f"a recorded call, made smaller by mla-spec {__version__}")
    return _lines(head, operation, inputs, dtype, outputs, declared, spec, device)


def _lines(
    head: list[str],
    operation: Operation,
    inputs: Any,
    dtype: str,
    outputs: dict[str, tuple[Array, Array]],
    declared: Description,
    spec: Sequence[str],
    device: str,
) -> str:
    """The script of one call."""
    driver = Driver(SimpleNamespace(supports=declared.supports), dtype)
    tensors = driver.tensors(operation, inputs)
    count = sum(x.numel() for x in tensors.values()) + sum(2 * want.size for want, _ in outputs.values())
    if count > MOST:
        raise NotExportable(
            f"the smallest case has {count} numbers, and a script at most {MOST}; `mla-spec dump` writes them to a file"
        )
    body = [
        *(f"{_variable(name)} = {_tensor(x)}" for name, x in tensors.items()),
        *_dicts(operation, tensors),
        *_call(operation, inputs, dtype),
        *(line for name, parts in outputs.items() for line in _answer(name, *parts)),
    ]
    lines = [
        *head,
        *_imports(body),
        *_kernel(spec, operation),
        *_device(device),
        *body,
        *_TAIL,
    ]
    if len(lines) > LONGEST:
        raise NotExportable(f"the script would have {len(lines)} lines, and at most {LONGEST} are allowed")
    return "\n".join(lines) + "\n"


def _operation(record: Record, case: Case) -> Operation:
    """The operation of which one call on the case is judged."""
    found = [each for each in CALLED if each.case is type(case) and (each.name,) == needs(record)]
    if not found:
        raise NotExportable(f"{record.law} does not judge one call")
    return found[0]


def _bounded(want: Expected) -> tuple[Array, Array]:
    """The answer of an output, and how far it may be from it."""
    if isinstance(want, Exactly):
        return want.value, np.zeros(want.value.shape)
    assert isinstance(want, Within)
    bound = np.broadcast_to(want.bound.total, want.value.shape)
    return want.value, bound if want.read is None else np.where(want.read, bound, np.inf)


def _require_same(record: Record, operation: Operation, outputs: dict[str, tuple[Array, Array]]) -> None:
    """Raise NotExportable unless what the law judged is what the call gives."""
    if record.verdict == "crashed" and record.law.endswith("_agrees_with_reference"):
        return
    found = record.evidence[:1]
    names = {output.what or output.name: output.name for output in operation.outputs}
    if not found or found[0]["case"] != record.case or names.get(found[0]["what"]) not in outputs:
        raise NotExportable(f"{record.law} does not compare one call with the exact result")
    want = outputs[names[found[0]["what"]]][0]
    same = list(want.shape) == found[0]["shape"]
    if not same or any(
        float(row[2]) != want.flat[row[0]] and float(row[2]) == float(row[2]) for row in found[0]["sample"]
    ):
        raise NotExportable(f"{record.law} judges another call than that of its case")


def _head(operation: Operation, message: str, origin: str) -> list[str]:
    return [
        f"# {operation.name}: {one_line(message.splitlines()[0], 200)}",
        f"# {origin}",
        "# Exit code 1: an output is further from the float64 answer than the declared arithmetic explains.",
    ]


def _imports(body: Sequence[str]) -> list[str]:
    text = "\n".join(body)
    numbers = [name for name in ("inf", "nan") if re.search(rf"\b{name}\b", text)]
    lines = ["import sys", *([f"from math import {', '.join(numbers)}"] if numbers else [])]
    return [*lines, *(["from types import SimpleNamespace"] if "SimpleNamespace(" in text else []), "", "import torch"]


def _device(device: str) -> list[str]:
    return [] if device == "cpu" else [f"torch.set_default_device({device!r})"]


def _kernel(spec: Sequence[str], operation: Operation) -> list[str]:
    """Lines that make ``kernel``, a function."""
    if spec[0] in SHIPPED:
        raise NotExportable(f"{spec[0]} is part of mla-spec")
    signature = spec[spec.index("--signature") + 1] if "--signature" in spec else None
    if signature is not None and signature not in operation_names():
        raise NotExportable(f"{spec[0]} is called as {signature} is, not as the contract says")
    module, _, name = spec[0].rpartition(":")
    if module.endswith(".py"):
        folder = str(Path(module).parent)
        lines = [f"sys.path.insert(0, {folder!r})", f"from {Path(module).stem} import {name.partition('.')[0]}"]
        if not re.fullmatch(r"[A-Za-z_]\w*", Path(module).stem):
            raise NotExportable(f"{module} has a name that cannot be imported")
    else:
        lines = [f"from {module} import {name.partition('.')[0]}"]
    if signature is not None:
        return [*lines, "", f"kernel = {name}"]
    return [*lines, "", f"kernel = ({name}() if isinstance({name}, type) else {name}).{operation.name}"]


def _variable(name: str) -> str:
    return name.replace(".", "_")


def _dicts(operation: Operation, tensors: Tensors) -> list[str]:
    """Arguments that are dicts of tensors."""
    lines = []
    for argument in operation.arguments:
        prefix = f"{argument.name}."
        parts = {name.removeprefix(prefix): _variable(name) for name in tensors if name.startswith(prefix)}
        if parts:
            items = ", ".join(f"{key!r}: {value}" for key, value in parts.items())
            lines.append(f"{argument.name} = {{{items}}}")
    return lines


def _given(operation: Operation, inputs: Any) -> list[str]:
    """The options that the call passes."""
    return [name for name in operation.options if getattr(inputs, name) is not None]


def _call(operation: Operation, inputs: Any, dtype: str) -> list[str]:
    """The call, and ``got``, its outputs by name."""
    arguments, options = [], []
    for argument in operation.arguments:
        absent = getattr(inputs, argument.name) is None
        value = _literal(getattr(inputs, argument.name)) if argument.kind == "config" else argument.name
        value += ".view(torch.float8_e4m3fn)" if argument.kind == "codes" else ""
        if not argument.optional:
            arguments.append(value)
        elif not absent:
            options.append(f"{argument.name}={value}")
    for name in (*operation.keywords, *_given(operation, inputs)):
        value = f"torch.{dtype}" if name == "dtype" else _literal(getattr(inputs, name))
        options.append(f"{name}={value}")
    call = f"kernel({', '.join([*arguments, *options])})"
    returned = [output.name for output in operation.returned]
    written = [f"{name!r}: {name}" for name in operation.written]
    if not returned:
        return [call, f"got = {{{', '.join(written)}}}", "want, bound = {}, {}"]
    values = f"[{call}]" if len(returned) == 1 else call
    given = f" | {{{', '.join(written)}}}" if written else ""
    return [f"got = dict(zip({returned!r}, {values})){given}", "want, bound = {}, {}"]


def _answer(name: str, want: Array, bound: Array) -> list[str]:
    """Lines with the answer of an output, and its bound."""
    return [
        f"want[{name!r}] = {_tensor(torch.from_numpy(want))}",
        f"bound[{name!r}] = {_tensor(torch.from_numpy(np.array(bound)))}",
    ]


_TAIL = [
    "wrong = 0",
    "for name in want:",
    "    x, w, b = got[name].detach().double(), want[name], bound[name]",
    "    bad = ~(((x - w).abs() <= b) | (x == w) | (x.isnan() & w.isnan()))",
    "    for i in map(tuple, bad.nonzero().tolist()[:10]):",
    '        print(f"{name}{list(i)}: got {x[i]}, want {w[i]}, at most {b[i]:.3g} away")',
    "    wrong += int(bad.sum())",
    'print(f"{wrong} elements are wrong")',
    "sys.exit(wrong > 0)",
]


def _tensor(x: torch.Tensor) -> str:
    values = x.double().tolist() if x.is_floating_point() else x.tolist()
    empty = f".reshape({list(x.shape)})" if x.numel() == 0 else ""
    return f"torch.tensor({values!r}, dtype={x.dtype}){empty}"


def _literal(value: Any) -> str:
    """A value as Python writes it; a dataclass as an object with the same fields and properties."""
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    properties = [name for name in dir(type(value)) if isinstance(getattr(type(value), name), property)]
    names = [*(f.name for f in fields(value)), *(name for name in properties if not name.startswith("_"))]
    return f"SimpleNamespace({', '.join(f'{name}={_literal(getattr(value, name))}' for name in names)})"
