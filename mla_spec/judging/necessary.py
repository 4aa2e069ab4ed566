"""What a fault needs to show: a failing case is run again with one thing made plain, and where it holds then, that thing is needed.

A smaller case is looked for by Hypothesis; this says of what is left in it which part matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from mla_spec.judging.finding import Finding
from mla_spec.judging.verdict import Record
from mla_spec.operations.case import Case


@dataclass(frozen=True)
class Plain:
    """One thing that may be made plain.

    Attributes:
        topic: what a fault that needs it is about.
        field: of the case.
        value: its plain value, from the case.
        right: with what the subject is right then, as an adverbial.
        kind: of the cases that it is for; empty for all.
    """

    topic: str
    field: str
    value: Callable[[Any], Any]
    right: str
    kind: str = ""


def _one(case: Any) -> tuple[int, ...]:
    """The longest sequence alone."""
    return (max(case.seqlens),)


def _as_long(case: Any) -> tuple[int, ...]:
    return (max(case.seqlens),) * len(case.seqlens)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _other_layout(case: Any) -> str:
    return {"interleaved": "half", "half": "interleaved"}.get(str(case.layout), "none")


def _one_page(case: Any) -> int:
    lengths: tuple[int, ...] = getattr(case, "seqlens", (case.page_size,))
    return max(1, *lengths)


PLAIN: Final[tuple[Plain, ...]] = (
    Plain("mask", "causal", _always(False), "without the causal mask"),
    Plain("mask", "s", _always(1), "with one query a sequence", "decode"),
    Plain("rotation", "s", _always(1), "with one token a sequence", "rope"),
    Plain("batch", "seqlens", _one, "with one sequence alone"),
    Plain("batch", "seqlens", _as_long, "with sequences of equal lengths"),
    Plain("batch", "batch", _always(1), "with one sequence alone"),
    Plain("mask", "seqlens_k", lambda case: case.seqlens_q, "with as many keys as queries"),
    Plain("mask", "seqlens_q", lambda case: tuple(min(n, 1) for n in case.seqlens_q), "with one query a sequence"),
    Plain("reads", "page_size", _one_page, "with one page a sequence"),
    Plain("heads", "num_heads", _always(1), "with one head"),
    Plain("heads", "heads", _always(1), "with one head"),
    Plain("scores", "qk_rope_head_dim", _always(0), "without rope dims"),
    Plain("rotation", "yarn", _always("none"), "without YaRN"),
    Plain("rotation", "longrope", _always("none"), "without LongRoPE"),
    Plain("rotation", "layout", _other_layout, "with the other layout of pairs"),
    Plain("rotation", "start", _always(0), "with positions from 0"),
    Plain("rotation", "stride", _always(1), "with positions that follow each other"),
    Plain("rotation", "theta", _always(10000.0), "with the theta 10000"),
    Plain("queries", "q_lora_rank", _always(None), "without query compression"),
    Plain("queries", "llama_4_scaling", _always(False), "without a temperature by position"),
    Plain("latent", "mla_scale_kv_lora", _always(False), "without a factor on the latent"),
    Plain("queries", "mla_scale_q_lora", _always(False), "without a factor on the query latent"),
    Plain("norm", "k_pe_norm", _always(False), "without a norm on k_pe"),
    Plain("norm", "latent_norm_eps", _always(1e-6), "with the eps 1e-6"),
    Plain("norm", "hidden_scale", _always(1.0), "with tokens of the size 1"),
    Plain("cache", "steps", _always(0), "without decoded tokens"),
    Plain("softmax", "logit_std", _always(1.0), "with scores of the size 1"),
    Plain("rounding", "dtype", _always("float64"), "in float64"),
)
"""In the order in which they are said."""

MOST = 2
"""Things that are said to be needed."""


def necessary(case: Case, again: Callable[[Case], Record]) -> list[Finding]:
    """What a failing case needs to fail; ``again`` runs its law on another case."""
    found: list[Finding] = []
    for plain, other in _plainer(case):
        if len(found) < MOST and _holds(again(other)):
            found.append(Finding(plain.topic, f"right {plain.right}"))
    return found


def _plainer(case: Case) -> Iterator[tuple[Plain, Case]]:
    """What the case has that is not plain, and the case without it."""
    for plain in PLAIN:
        if not hasattr(case, plain.field) or plain.kind not in ("", case.kind):
            continue
        try:
            other = replace(case, **{plain.field: plain.value(case)})
            if other != case:
                getattr(other, "build", lambda: None)()
                yield plain, other
        except (ValueError, TypeError, AssertionError, IndexError, KeyError):  # no such case can be made
            continue


def _holds(record: Record) -> bool:
    return record.verdict == "pass"
