"""The command ``mla-spec contract``."""

from __future__ import annotations

from mla_spec.operations.all import OPERATIONS
from mla_spec.text.terminal import UsageError


def contract(name: str | None) -> str:
    """The call of an operation and its contract; the calls of all where ``name`` is None.

    Raises:
        UsageError: no operation has the name.
    """
    if name is None:
        calls = "\n".join(f"{each.call}\n    returns {each.returns}" for each in OPERATIONS.values())
        return f"{calls}\n\n`mla-spec contract OPERATION` says more of one."
    if name not in OPERATIONS:
        raise UsageError(f"unknown operation {name!r}; known are {', '.join(OPERATIONS)}")
    operation = OPERATIONS[name]
    return f"{operation.call}\n    returns {operation.returns}\n\n{operation.contract.strip()}"
