"""A corpus of one's own: recorded calls as its cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.exchange.call import Call, address
from mla_spec.exchange.source import recorded_calls
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.golden.cases.case import Case, Values
from mla_spec.golden.corpus.arrays import STORED_DTYPES
from mla_spec.golden.corpus.compare import COMPUTED
from mla_spec.golden.corpus.error import CorpusError

ORIGIN = "recorded calls"
"""What the manifest of such a corpus has as its ``origin``."""

OPERATIONS = ("decode", "ragged_decode", "rank_decode", "prefill")

MOST = 2**18
"""Products of an answer in ball arithmetic, at most: about a minute."""

EXACT = "a recorded call; the answers are exact, and rounded once to float64"
FLOAT64 = "a recorded call; the answers are those of the float64 reference, whose own roundings bounds.json counts"

Answers = Callable[[str, Values, Mapping[str, Any]], dict[str, NDArray[Any]]]


def recorded_cases(path: str) -> list[Case]:
    """The calls of a folder that a corpus can have, each once: attention over a cache or packed keys, without sinks and windows.

    Raises:
        CorpusError: the folder holds none.
    """
    try:
        calls = [each.call for each in recorded_calls(path) if isinstance(each.call, Call)]
        cases = {case.name: case for call in calls if fits(call) for case in [_case(call)]}
    except ExchangeError as error:
        raise CorpusError(str(error)) from error
    if not cases:
        raise CorpusError(f"{path} holds no call of {', '.join(OPERATIONS)} in {', '.join(STORED_DTYPES)}")
    return [cases[name] for name in sorted(cases)]


def fits(call: Call) -> bool:
    """Whether a corpus can have the call."""
    plain = "attn_sink" not in call.tensors and call.values.get("window") is None
    stored = all(str(x.dtype).removeprefix("torch.") in STORED_DTYPES for x in call.tensors.values())
    return call.operation in OPERATIONS and plain and stored


def _case(call: Call) -> Case:
    inputs = vars(call.inputs())
    names = [argument.name for argument in call.signature.arguments if argument.name in call.tensors]
    case = Case(
        name=f"{call.operation}-{address(call.encoded())[:12]}",
        operation=call.operation,
        purpose="",
        catches="whatever differs from what was recorded",
        parameters={name: call.values[name] for name in call.signature.keywords},
        inputs={name: _array(inputs[name]) for name in names},
        dtypes={name: str(call.tensors[name].dtype).removeprefix("torch.") for name in names},
    )
    return replace(case, purpose=EXACT if products(case) <= MOST else FLOAT64)


def _array(x: NDArray[Any]) -> NDArray[Any]:
    return x.astype(np.int32) if x.dtype == np.int64 else x


def products(case: Case) -> int:
    """Products of numbers that the answers of a case are made of, at most."""
    q = case.inputs["q"]
    if case.operation == "prefill":
        keys, width = len(case.inputs["k"]), q.shape[-1] + case.inputs["v"].shape[-1]
    else:
        keys = int(case.inputs["cache_seqlens"].max(initial=0))
        width = q.shape[-1] + int(case.parameters["head_dim_v"])
    count: int = math.prod(q.shape[:-1]) * keys * width
    return count


def answers(case: Case, exact: Answers) -> dict[str, NDArray[Any]]:
    """The answers of a recorded call: ``exact`` where there are few products, else those of the float64 reference."""
    if case.purpose == EXACT:
        return exact(case.operation, case.inputs, case.parameters)
    return {each.name: each.value for each in COMPUTED[case.operation](case.inputs, case.parameters)}
