"""What the parameters of a case may be, before anything is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_spec.text.terminal import shown
from mla_spec.text.typed import Count, Mistyped, Size, checked

LARGEST = 2**16
"""A size, at most; cases are small."""

_POSITIONS = 2**31
"""A position, at most: these size no array."""

PARAMETERS: dict[str, Any] = {
    "block_size": tuple[Count, Count],
    "causal": bool,
    "config": dict[str, Any],
    "eps": float,
    "format": str,
    "head_dim_v": Count,
    "interleave": Count,
    "layout": str,
    "overflow": str,
    "page_size": Count,
    "prompt": Count,
    "rank": Size,
    "ranks": Count,
    "rope": dict[str, Any],
    "softmax_scale": float,
    "start": Size,
    "tensor_scale": float,
    "tokens": Size,
    "top_k": Count,
    "window": Count,
}
"""The parameters of all operations, by name."""


def fault(parameters: Mapping[str, Any]) -> str:
    """The first parameter that is unknown, of another type or too large, and what was expected, or ""."""
    for name, value in parameters.items():
        if name not in PARAMETERS:
            return f"unknown parameter {shown(name)}; expected some of {', '.join(PARAMETERS)}"
        try:
            checked(value, PARAMETERS[name], f"parameter {name}")
        except Mistyped as error:
            return str(error)
        if why := _too_large(value, f"parameter {name}"):
            return why
    return ""


def _too_large(value: Any, where: str) -> str:
    """The first number anywhere in ``value`` that is too large."""
    if isinstance(value, dict):
        return next(
            (why for key, each in value.items() if (why := _too_large(each, f"{where}.{shown(key)[1:-1]}"))), ""
        )
    if isinstance(value, list):
        return next((why for each in value if (why := _too_large(each, where))), "")
    most = _POSITIONS if where.endswith("position_embeddings") else LARGEST
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most:
        return f"{where} is {shown(value)}; expected at most {most}"
    return ""
