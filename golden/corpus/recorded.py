"""A corpus of one's own: recorded calls as its cases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.exchange.call import Call, address
from mla_spec.exchange.source import recorded_calls
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.golden.cases.case import Case, Values
from mla_spec.golden.corpus.arrays import LARGEST_ARRAY, STORED_DTYPES
from mla_spec.golden.corpus.compare import COMPUTED
from mla_spec.golden.corpus.error import CorpusError
from mla_spec.golden.corpus.parameters import fault
from mla_spec.operations.all import OPERATIONS as CALLED
from mla_spec.operations.operation import Operation
from mla_spec.text.terminal import one_line

ORIGIN = "recorded calls"
"""What the manifest of such a corpus has as its ``origin``."""

OPERATIONS = tuple(name for name, each in CALLED.items() if isinstance(each, Operation) and each.recorded is not None)
"""Operations whose answers follow from the arguments of a call alone."""

BITWISE = {"absorb": ("w_uk", "w_uv"), "write_cache": ("out",)}
"""Answers that are numbers of the arguments, by operation."""

RENAMED = {"format": "layout"}
"""Arguments that cases have under another name."""

MOST = 2**18
"""Products of an answer in ball arithmetic, at most: about a minute."""

EXACT = "a recorded call; the answers are exact, and rounded once to float64"
FLOAT64 = "a recorded call; the answers are those of the float64 reference, whose own roundings bounds.json counts"

Answers = Callable[[str, Values, Mapping[str, Any]], dict[str, NDArray[Any]]]


class Unfit(Exception):
    """Why a corpus cannot have a call, as a clause."""


def recorded_cases(path: str) -> tuple[list[Case], list[str]]:
    """The calls of a folder that a corpus can have, each once, and a line for each other one, which says why not.

    Raises:
        CorpusError: the folder holds none that a corpus can have.
    """
    found: dict[str, Case] = {}
    left_out = []
    try:
        for each in recorded_calls(path):
            try:
                case = case_of(each.call)
                found[case.name] = case
            except Unfit as reason:
                left_out.append(f"left out {each.name}: {reason}")
    except ExchangeError as error:
        raise CorpusError(str(error)) from error
    if not found:
        first = f"; {left_out[0]}" if left_out else ""
        raise CorpusError(f"{path} holds no call that a corpus can have, of {', '.join(OPERATIONS)}{first}")
    return [found[name] for name in sorted(found)], left_out


def case_of(call: Call | str) -> Case:
    """The case that a call is, whose answers the float64 reference computes; Unfit where there is none."""
    if isinstance(call, str):
        raise Unfit(call)
    if call.operation not in OPERATIONS:
        raise Unfit(f"what {call.operation} must give does not follow from its arguments")
    for name, x in call.tensors.items():
        if _dtype(x) not in STORED_DTYPES or x.numel() > LARGEST_ARRAY:
            raise Unfit(f"{name} is {_dtype(x)} {list(x.shape)}; a corpus holds {', '.join(STORED_DTYPES)}")
    case = _case(call)
    if wrong := fault(case.parameters):
        raise Unfit(wrong)
    try:
        results = answers(replace(case, purpose=FLOAT64), _never)
    except Exception as error:  # whatever its arguments lead to
        raise Unfit(f"its arguments make no sense to the reference: {one_line(error, 200)}") from error
    for name, result in results.items():
        if np.isnan(result).any() or (np.isposinf(result).any() and name not in case.exact):
            raise Unfit(f"{name} must have elements that are no numbers")
    return replace(case, purpose=EXACT if products(case) <= MOST and _in_float32(case) else FLOAT64)


def _case(call: Call) -> Case:
    try:
        inputs = vars(call.inputs())
    except ExchangeError as error:
        raise Unfit(str(error)) from error
    names = [argument.name for argument in call.signature.arguments if argument.name in call.tensors]
    arrays = {name: inputs[name] for name in names}
    dtypes = {name: _dtype(call.tensors[name]) for name in names}
    given = [name for name in (*call.signature.keywords, "config", *call.signature.options) if name in call.values]
    case = Case(
        name=f"{call.operation}-{address(call.encoded())[:12]}",
        operation=call.operation,
        purpose="",
        catches="whatever differs from what was recorded",
        parameters={RENAMED.get(name, name): _plain(inputs[name]) for name in given if inputs[name] is not None},
        inputs={name: x.astype(dtypes[name]) if x.dtype.kind in "iu" else x for name, x in arrays.items()},
        dtypes=dtypes,
        exact=BITWISE.get(call.operation, ()),
    )
    return _with_a_batch(case) if call.operation == "merge" else case


def _with_a_batch(case: Case) -> Case:
    """Parts of one sequence, of which a call may leave out the axis of the batch."""
    if case.inputs["outs"].ndim != 4:
        return case
    return replace(case, inputs={name: x[:, None] for name, x in case.inputs.items()})


def _dtype(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """A value as a manifest has it."""
    return json.loads(json.dumps(asdict(value))) if is_dataclass(value) and not isinstance(value, type) else value


def _in_float32(case: Case) -> bool:
    """Whether a code times the scale of a tensor is a float64 number, which ball arithmetic begins with."""
    scale = float(case.parameters.get("tensor_scale", 1.0))
    return float(np.float32(scale)) == scale


def products(case: Case) -> int:
    """Products of numbers that the answers of a case are made of, at most."""
    x = case.inputs
    if "q" not in x:
        return sum(int(each.size) for each in x.values() if each.dtype.kind == "f")
    q = x["q"]
    if case.operation == "prefill":
        keys, width = len(x["k"]), q.shape[-1] + x["v"].shape[-1]
    else:
        keys = x["indices"].shape[-1] if "indices" in x else int(x["cache_seqlens"].max(initial=0))
        width = q.shape[-1] + int(case.parameters["head_dim_v"])
    unpacked = x["pages"].size if "pages" in x else 0
    count: int = math.prod(q.shape[:-1]) * keys * width + unpacked
    return count


def answers(case: Case, exact: Answers) -> dict[str, NDArray[Any]]:
    """The answers of a recorded call: ``exact`` where there are few products, else those of the float64 reference."""
    if case.purpose == EXACT:
        return exact(case.operation, case.inputs, case.parameters)
    return {each.name: each.value for each in COMPUTED[case.operation](case.inputs, case.parameters)}


def _never(operation: str, inputs: Values, parameters: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    raise AssertionError
