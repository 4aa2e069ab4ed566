"""What faulty behaviors of any call have in common.

A behavior makes, from the correct method of a subject, a faulty one. Each is triggered by what triggers it in real kernels:
offsets beyond 2^32, a number of rows that is no multiple of a tile, contents that change behind autograd's counter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mla_spec.operations.all import CALLED

Method = Callable[..., Any]
Behavior = Callable[[str, Method], Method]

OPERATIONS = {operation.name: operation for operation in CALLED}


def each_tensor(change: Callable[[Tensor], Tensor], returned: Any) -> Any:
    """The same with ``change`` made to every tensor."""
    if isinstance(returned, tuple):
        return tuple(change(x) if isinstance(x, Tensor) else x for x in returned)
    return change(returned)


def kept_by(subject: Any) -> dict[Any, Any]:
    """What a subject keeps between calls."""
    kept: dict[Any, Any] = subject.__dict__.setdefault("_kept", {})
    return kept
