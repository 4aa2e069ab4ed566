"""How many sequences and keys a case has, and the same case with fewer of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mla_spec.operations.case import Case
from mla_spec.subjects.supports import Supports

C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Most:
    """How large a case may be.

    Attributes:
        batch: sequences of a call; None for any number.
        keys: that a query sees: cached tokens of a sequence, keys of a packed one, indices of sparse attention, tokens that a
            layer has cached; None for any number.
    """

    batch: int | None = None
    keys: int | None = None

    @classmethod
    def of(cls, supports: Supports) -> Most:
        """What a subject declares."""
        return cls(supports.max_batch, supports.max_keys)

    def __and__(self, other: Most) -> Most:
        """The smaller of each."""
        return Most(_least(self.batch, other.batch), _least(self.keys, other.keys))

    def cut(self, case: C, topk_multiple: int = 1) -> C:
        """The case, or the same with fewer sequences and keys.

        Of a packed sequence that loses keys, as many tokens before its first query remain as can.
        """
        changes: dict[str, Any] = {}
        for name in ("seqlens", "seqlens_q", "batch", "prompt", "topk"):
            value = getattr(case, name, None)
            if value is not None:
                changes |= self._changes(case, name, value, topk_multiple)
        return replace(case, **{name: value for name, value in changes.items() if value != getattr(case, name)})

    def _changes(self, case: Case, name: str, value: Any, topk_multiple: int) -> dict[str, Any]:
        if name == "seqlens":
            return {name: tuple(_cut(length, self.keys) for length in value[: self.batch])}
        if name == "seqlens_q":
            return self._packed(value, getattr(case, "seqlens_k", value))
        if name == "batch":
            return {name: _cut(value, self.batch)}
        if self.keys is None:
            return {}
        if name == "prompt":
            steps = min(getattr(case, "steps", 0), self.keys - 1)
            return {"prompt": min(value, self.keys - steps), **({"steps": steps} if hasattr(case, "steps") else {})}
        return {name: min(value, max(topk_multiple, self.keys - self.keys % topk_multiple))}

    def _packed(self, queries: Sequence[int], keys: Sequence[int]) -> dict[str, Any]:
        pairs = list(zip(queries, keys, strict=True))
        if self.batch is not None and len(pairs) > self.batch:
            fullest = max(
                range(len(pairs)), key=lambda i: pairs[i][1] if pairs[i][0] else -1
            )  # stays, for it shows most
            start = max(0, fullest - self.batch + 1)
            pairs = pairs[start : start + self.batch]
        if self.keys is not None:
            pairs = [_shortened(n, t, self.keys) for n, t in pairs]
        return {"seqlens_q": tuple(n for n, _ in pairs), "seqlens_k": tuple(t for _, t in pairs)}


def beyond(case: Case, supports: Supports) -> str:
    """Which limit of ``supports`` a case exceeds, as a clause, or ""."""
    for name, most in (("max_batch", Most(batch=supports.max_batch)), ("max_keys", Most(keys=supports.max_keys))):
        if most.cut(case, supports.topk_multiple) != case:
            return f"{name}={getattr(supports, name)}, and the case has more"
    return ""


def _shortened(queries: int, keys: int, most: int) -> tuple[int, int]:
    """A packed sequence with at most so many keys; where keys go, queries go too, but for one."""
    if keys <= most:
        return queries, keys
    return min(queries, max(1, queries - (keys - most))), most


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)


def _cut(value: int, most: int | None) -> int:
    return value if most is None else min(value, most)
