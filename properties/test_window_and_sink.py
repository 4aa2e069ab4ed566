"""Laws of ``decode`` and ``prefill`` with an attention sink, and with a window of keys.

Every statement holds for both operations. It is written once, and makes a law of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Law, Run, as_test
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeInputs
from mla_spec.operations.operation import Operation
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillInputs
from mla_spec.properties.cases import CASES, Cases
from mla_spec.properties.fixed import decode, prefill
from mla_spec.properties.fixed.options import with_all_options, with_sinks, with_windows
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.prefill import prefill_cases
from mla_spec.properties.strategies.sizes import SINK_STDS, WINDOWS, narrowed
from mla_spec.reference.typing import BoolArray, IntArray
from mla_spec.subjects.supports import Supports

Check = Callable[[Operation, Run, Any], None]


def _without_sink(operation: str, supports: Supports) -> str:
    return "" if operation in supports.dense_sink else f"{operation} takes no attn_sink"


def _without_window(operation: str, supports: Supports) -> str:
    if operation not in supports.sliding_window:
        return f"{operation} takes no window"
    return "" if True in supports.causal else f"{operation} is never causal"


def _both(
    end: str, missing: Callable[[str, Supports], str], *, option: str = "", **keywords: Any
) -> Callable[[Check], Check]:
    """Make two laws of a statement; their names end with ``end``, and ``keywords`` are those of both strategies.

    ``option``: "sink" or "window" where they begin with that option at counts of production.
    """

    def decorate(check: Check) -> Check:
        for operation, strategy, long in (
            (DECODE, decode_cases, decode.long),
            (PREFILL, prefill_cases, prefill.long),
        ):
            of_one = partial(check, operation)
            of_one.__doc__ = check.__doc__
            name, cases = f"test_{operation.name}_{end}", narrowed(strategy, **keywords)
            absent, first = partial(missing, operation.name), partial(_first, operation.name, option, long)
            made = Law(name, (operation.name,), cases, of_one, absent, first=first)
            globals()[name] = as_test(made, __name__)
        return check

    return decorate


def _first(operation: str, option: str, long: Cases, supports: Supports, profile: Profile) -> list[Any]:
    """The ordinary case with the options, and where one is named, ``long`` cases with it."""
    cases: list[Any] = with_all_options(operation, CASES[operation].ordinary(supports, profile), supports)
    if option == "sink":
        cases += with_sinks(long(supports, profile))
    if option == "window":
        cases += with_windows(operation, long(supports, profile), supports)
    return cases


@_both("attention_sink", _without_sink, option="sink", sinks=("finite", "infinite"), logit_stds=SINK_STDS)
def _attention_sink(operation: Operation, run: Run, case: Any) -> None:
    """A sink takes its share of out and of nothing else; -inf takes none, and +inf leaves exactly 0."""
    inputs = case.build()
    run.agrees(operation, inputs, run.call(operation, inputs))


@_both("equal_sink_takes_half", _without_sink, sinks=("finite",), logit_stds=SINK_STDS)
def _equal_sink_takes_half(operation: Operation, run: Run, case: Any) -> None:
    """A sink that equals the only score takes exactly half of the weight."""
    alone = replace(case, **_one_key_each(case, run.supports), window=0)
    inputs = alone.build()
    inputs = replace(inputs, q=np.zeros_like(inputs.q), attn_sink=np.zeros(case.num_heads))
    if isinstance(inputs, DecodeInputs):
        inputs = replace(inputs, kv_cache=np.rint(2 * inputs.kv_cache))
        first = inputs.kv_cache[inputs.block_table[:, 0], 0, :, : inputs.head_dim_v]  # [b, 1, c]
        half = np.broadcast_to(first[:, None] / 2, (*inputs.q.shape[:3], inputs.head_dim_v))
    else:
        inputs = replace(inputs, v=np.rint(2 * inputs.v))
        half = inputs.v / 2
    out = run.call(operation, inputs).out
    run.compares(out.value.size)
    wrong = out.value != half
    run.require(
        not wrong.any(),
        f"{int(wrong.sum())} of {wrong.size} elements of out are not exactly half the value of the one key, whose score "
        f"equals the sink; first: got {out.value[wrong][:1]}, want {half[wrong][:1]}",
    )


def _one_key_each(case: Any, supports: Supports) -> dict[str, Any]:
    """Lengths of a case in which each query sees one key."""
    if hasattr(case, "seqlens"):
        return {"seqlens": (1,) * len(case.seqlens), "s": 1}
    count = len(case.seqlens_q)
    return {"seqlens_q": (1,) * count, "seqlens_k": (1,) * count}


@_both("window", _without_window, option="window", windows=WINDOWS, causal=True)
def _window(operation: Operation, run: Run, case: Any) -> None:
    """Each query sees the last keys of those that it would see, as many as the window has."""
    inputs = case.build()
    run.agrees(operation, inputs, run.call(operation, inputs))


@_both("ignores_keys_before_its_window", _without_window, windows=WINDOWS[:-1], causal=True)
def _ignores_keys_before_its_window(operation: Operation, run: Run, case: Any) -> None:
    """Changing keys before the window of a sequence's last query changes no bit of that query's row."""
    inputs = case.build()
    changed, queries = _with_other_first_keys(inputs)
    if not len(queries):
        run.trivial("no sequence has a key before the window of its last query")
    for got, want in zip(run.call(operation, changed), run.call(operation, inputs), strict=True):
        if got is not None and want is not None:
            row = _row(operation, got.what, queries)
            run.same_bits(got[row], want[row], "only keys before the window of these queries were changed")


def _row(operation: Operation, what: str, queries: IntArray) -> Any:
    """The index of the last queries of some sequences in out [b, s, h, v] or [tokens, h, v], or in an LSE."""
    if operation is DECODE:
        return np.s_[queries, -1:] if what == "out" else np.s_[queries, :, -1:]
    return queries if what == "out" else np.s_[:, queries]


def _with_other_first_keys(inputs: DecodeInputs | PrefillInputs) -> tuple[Any, IntArray]:
    """Keys before the window of each sequence's last query as their negatives, and which queries have such keys.

    Of decode they are named by their sequences, of prefill by their tokens.
    """
    assert inputs.window is not None
    if isinstance(inputs, DecodeInputs):
        page_size, cache = inputs.kv_cache.shape[1], inputs.kv_cache.copy()
        token = np.arange(int(inputs.cache_seqlens.max(initial=0)))
        before = token < inputs.cache_seqlens[:, None] - inputs.window  # [b, t]
        sequence, token = np.nonzero(before)
        slots = inputs.block_table[sequence, token // page_size], token % page_size
        cache[slots] = -inputs.kv_cache[slots]
        return replace(inputs, kv_cache=cache), np.flatnonzero(before.any(axis=1))
    ends = inputs.cu_seqlens_k[1:]
    early: BoolArray = np.zeros(len(inputs.k), dtype=bool)
    queries = []
    for i, (start, end) in enumerate(zip(inputs.cu_seqlens_k[:-1], ends, strict=True)):
        early[start : max(start, end - inputs.window)] = True
        if inputs.cu_seqlens_q[i] < inputs.cu_seqlens_q[i + 1] and end - inputs.window > start:
            queries.append(int(inputs.cu_seqlens_q[i + 1]) - 1)
    sign = np.where(early, -1.0, 1.0)[:, None, None]
    return replace(inputs, k=sign * inputs.k, v=sign * inputs.v), np.array(queries, dtype=int)
