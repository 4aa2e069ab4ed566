"""A case of the corpus as it lies on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class StoredCase:
    """A case as read from disk, its values decoded.

    Attributes:
        inputs, expected: by name; floating-point values as float64, integers as int64.
        exact: names of expected arrays whose bits float64 arithmetic reproduces.
    """

    name: str
    operation: str
    purpose: str
    catches: str
    sources: list[str]
    parameters: Mapping[str, Any]
    inputs: dict[str, NDArray[Any]]
    expected: dict[str, NDArray[Any]]
    exact: list[str]
