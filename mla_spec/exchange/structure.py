"""Calls without the numbers of their tensors: shapes, strides, tables, lengths and moments."""

from __future__ import annotations

from dataclasses import replace

from mla_spec.exchange.call import Call
from mla_spec.exchange.moments import moments_of
from mla_spec.exchange.smaller import renumbered
from mla_spec.exchange.tensor_file import ExchangeError, dtype_name

LARGEST = 2**30
"""Bytes of tensors that are drawn for a call, at most."""


def structure_of(call: Call) -> Call | None:
    """The call with moments in the place of its numbers; None where bytes are among them, which have no moments.

    Moments of a pool are those of the pages that the lengths need, or of the rows that are selected.
    """
    if any(argument.kind == "bytes" for argument in call.signature.arguments):
        return None
    used = renumbered(call).tensors
    moments = {
        name: moments_of(used[name], tuple(x.shape), dtype_name(name, x))
        for name, x in call.tensors.items()
        if x.is_floating_point()
    }
    whole = {name: x.clone() for name, x in call.tensors.items() if name not in moments}
    stubs = {name: x.new_zeros(()).expand(x.shape) for name, x in call.tensors.items() if name in moments}
    return replace(call, tensors={**whole, **stubs}, moments=moments)


def drawn(call: Call, what: str) -> Call:
    """The call with tensors drawn by their moments; ``what`` names it in messages.

    Where these would be larger than ``LARGEST`` the pool has only the pages that the lengths need, and tables name them anew.

    Raises:
        ExchangeError: they are larger even so, or the tables name what is not there.
    """
    if not call.moments:
        return call
    try:
        compact = call if _bytes(call) <= LARGEST else renumbered(call)
    except (IndexError, RuntimeError, ValueError) as error:
        raise ExchangeError(f"{what}: its tables and lengths make no sense: {error}") from error
    if _bytes(compact) > LARGEST:
        raise ExchangeError(f"{what}: its tensors need {_bytes(compact)} bytes; expected at most {LARGEST}")
    made = {name: m.drawn(name, tuple(compact.tensors[name].shape)) for name, m in call.moments.items()}
    return Call(call.operation, {**compact.tensors, **made}, call.values, call.strides)


def _bytes(call: Call) -> int:
    return sum(x.numel() * x.element_size() for x in call.tensors.values())
