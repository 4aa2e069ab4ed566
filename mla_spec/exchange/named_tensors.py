"""Plain files of tensors as recorded calls, by a short file that says which tensor is which argument.

    operation = "decode"
    files = "step-*.pt"            # in the folder; one call a file

    [tensors]                      # argument = name in the file; "a.b" is b in a dict a, "a.0" the first of a list
    q = "query"
    kv_cache = "cache"
    block_table = "tables"
    cache_seqlens = "lengths"

    [values]                       # of arguments that are no tensors
    head_dim_v = 512
    softmax_scale = 0.0722
    causal = true

    [outputs]                      # may be left out
    out = "attention.0"
    lse = "attention.1"

The same as JSON will do. ``lse_base = 2`` says that an LSE is of base 2.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mla_spec.exchange.call import Call, read_call
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.recorded import Recorded
from mla_spec.exchange.tensor_dump import SUFFIXES, read_dump
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.installed import operation_named
from mla_spec.subjects.signature import Signature
from mla_spec.text.files import read_text
from mla_spec.text.terminal import shown
from mla_spec.text.typed import read_object


@dataclass(frozen=True)
class Names:
    """What the file says."""

    operation: str
    tensors: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    files: str = ""
    lse_base: Literal[2, "e"] = "e"


def named_calls(folder: Path, names: str) -> Iterator[Recorded]:
    """The calls in the files of a folder.

    Raises:
        ExchangeError: ``names`` cannot be read, or no file is there.
    """
    said = read_names(names)
    found = sorted(path for path in folder.glob(said.files or "*") if path.suffix in SUFFIXES)
    if not found:
        raise ExchangeError(
            f"{shown(str(folder))} holds no file {said.files or ' or '.join(f'*{s}' for s in SUFFIXES)}"
        )
    return (_recorded(path, said) for path in found)


def read_names(path: str) -> Names:
    """The content of a file of names; ExchangeError in one sentence where it is none."""
    try:
        text = read_text(path)
        content = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
        said: Names = read_object(Names, content, shown(path))
    except OSError as error:
        raise ExchangeError(f"cannot read {shown(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{shown(path)}: {error}") from error
    operation = operation_named(said.operation)
    if not isinstance(operation, Signature):
        raise ExchangeError(
            f"{shown(path)}: the operation is {shown(said.operation)}, which takes no tensors or is unknown"
        )
    known = {"tensors": [a.name for a in operation.arguments], "outputs": [o.name for o in operation.outputs]}
    known["values"] = [*operation.keywords, *operation.options]
    for part, allowed in known.items():
        for name, value in getattr(said, part).items():
            if name.partition(".")[0] not in allowed:
                raise ExchangeError(
                    f"{shown(path)}: {part} has {shown(name)}; {operation.name} has {', '.join(allowed)}"
                )
            if part != "values" and not isinstance(value, str):
                raise ExchangeError(
                    f"{shown(path)}: {name} is {shown(value)}; expected the name of a tensor in the files"
                )
    return said


def _recorded(path: Path, said: Names) -> Recorded:
    try:
        held = read_dump(path)
        tensors = {name: _laid_out(name, _held(held, there, path)) for name, there in said.tensors.items()}
        call = read_call(Call(said.operation, tensors, said.values).encoded(), shown(path.name))
        answer = _answer(held, said, path) if said.outputs else None
    except ExchangeError as error:
        return Recorded(path.name, str(error))
    return Recorded(path.name, call, answer)


def _laid_out(name: str, x: Tensor) -> Tensor:
    """A cache without its axis of one head gets it."""
    return x[:, :, None] if name == "kv_cache" and x.ndim == 3 else x


def _answer(held: Mapping[str, Any], said: Names, path: Path) -> Callable[[], Answer]:
    found = {name: _held(held, there, path) for name, there in said.outputs.items()}
    if said.lse_base == 2 and "lse" in found:
        found["lse"] = found["lse"].double() * math.log(2)
    return partial(dict, found)


def _held(held: Mapping[str, Any], name: str, path: Path) -> Tensor:
    found = held.get(name)
    if not isinstance(found, Tensor):
        raise ExchangeError(f"{path.name} has no tensor {shown(name)}; it has {', '.join(map(shown, list(held)[:20]))}")
    return found
