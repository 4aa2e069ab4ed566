"""The command ``mla-spec dump``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from safetensors.torch import save

from mla_spec import __version__
from mla_spec.operations.all import CALLED, parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.layer import LayerCase, LayerInputs
from mla_spec.operations.operation import Operation
from mla_spec.subjects.driver import Driver, Tensors
from mla_spec.text.files import write_atomically
from mla_spec.text.table import format_table
from mla_spec.text.terminal import UsageError, require_output, shown


def dump(options: argparse.Namespace) -> int:
    """Write the tensors of a case, and print what they are."""
    try:
        case = parse_case(options.case)
    except ValueError as error:
        raise UsageError(str(error)) from error
    path = f"{case.kind}.safetensors" if options.output is None else options.output
    require_output("--output", path)
    tensors, keywords = contents_of(case)
    rows = [(name, str(x.dtype).removeprefix("torch."), str(list(x.shape))) for name, x in tensors.items()]
    metadata = {"case": case.id, "mla-spec": __version__, **{name: json.dumps(x) for name, x in keywords.items()}}
    data = save({name: x.contiguous() for name, x in tensors.items()}, metadata)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UsageError(f"cannot write {shown(path)}: {error.strerror}") from error
    if path != "-":
        print(format_table([("tensor", "dtype", "shape"), *rows, *((k, "", v) for k, v in metadata.items())]))
    return 0


def operation_of(case: Case) -> Operation:
    """The operation whose call takes the inputs of a case; UsageError where there is none."""
    found = [operation for operation in CALLED if operation.case is type(case)]
    found.sort(key=lambda operation: operation.name != case.kind)
    if not found:
        kinds = ", ".join(dict.fromkeys(operation.case.kind for operation in CALLED))
        raise UsageError(f"a case of kind {case.kind} is not one call with tensors; cases of {kinds} are")
    return found[0]


def contents_of(case: Case) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a case by the names of arguments, and its other arguments as plain data.

    They are those of a subject that declares nothing: where there is no key, an LSE is -inf.
    """
    try:
        return _layer(case) if type(case) is LayerCase else _call(case)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"case {shown(case.id)}: its inputs cannot be built: {error}") from error


def _call(case: Case) -> tuple[Tensors, dict[str, Any]]:
    operation = operation_of(case)
    inputs = operation.build(case)
    tensors = Driver(object(), case.dtype).tensors(operation, inputs)
    for argument in operation.arguments:
        if argument.kind == "codes":
            tensors[argument.name] = tensors[argument.name].view(torch.float8_e4m3fn)
    options = [name for name in operation.options if getattr(inputs, name) is not None]
    names = [*operation.keywords, *options, *(a.name for a in operation.arguments if a.kind == "config")]
    values = {name: case.dtype if name == "dtype" else plain(getattr(inputs, name)) for name in names}
    return tensors, {"operation": operation.name, **values}


def _layer(case: Case) -> tuple[Tensors, dict[str, Any]]:
    inputs: LayerInputs = case.build()  # type: ignore[attr-defined]
    driver = Driver(object(), case.dtype)
    tensors = {f"weights.{name}": driver.tensor(x) for name, x in inputs.weights.items()}
    tensors |= {"hidden": driver.tensor(inputs.hidden), "positions": driver.integers(inputs.positions, torch.int64)}
    return tensors, {"operation": "layer", "config": plain(inputs.config)}


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
