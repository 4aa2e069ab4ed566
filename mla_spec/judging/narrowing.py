"""Which field of ``Supports`` keeps a subject from what it crashes on: it may not be made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mla_spec.installed import all_laws
from mla_spec.judging.separation import FEWEST, History
from mla_spec.operations.case import Case
from mla_spec.operations.layer import LayerCase
from mla_spec.subjects.supports import LAYER_DIMS, Supports

LAYER_OPTIONS: tuple[tuple[str, Callable[[LayerCase], bool]], ...] = (
    ("q_lora_rank='required'", lambda case: case.q_lora_rank is None),
    ("rope_layouts=()", lambda case: case.config.rope is not None),
    ("rope_optional=False", lambda case: case.config.rope is None),
    ("rope_layouts=('interleaved',)", lambda case: case.config.rope is not None and not case.config.rope.interleaved),
    ("rope_layouts=('half',)", lambda case: case.config.rope is not None and case.config.rope.interleaved),
    ("yarn=False", lambda case: case.config.rope is not None and case.config.rope.yarn is not None),
    ("longrope=False", lambda case: case.config.rope is not None and case.config.rope.longrope is not None),
    ("k_pe_norm=False", lambda case: case.config.k_pe_norm),
    ("llama_4_scaling=False", lambda case: case.config.llama_4_scaling is not None),
    ("mla_scale_lora=False", lambda case: case.config.mla_scale_q_lora or case.config.mla_scale_kv_lora),
    ("layer_equal_head_dims=True", lambda case: case.qk_nope_head_dim != case.v_head_dim),
)
"""What a layer may declare, and the cases that it is then not given."""

OPTIONS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("empty_row='unsupported'", lambda case: 0 in getattr(case, "seqlens_k", getattr(case, "seqlens", ()))),
    ("causal=(True,)", lambda case: not getattr(case, "causal", True)),
    ("causal=(False,)", lambda case: getattr(case, "causal", False)),
    ("negative_scale=False", lambda case: getattr(case, "regime", "") == "negative"),
    ("attention_sink=False", lambda case: getattr(case, "sink", "none") != "none"),
    ("topk_length=False", lambda case: getattr(case, "with_length", False)),
)
"""The same of operations."""

NOT_MADE_FOR = "if it is not made for such cases, declare"
"""Begins the line of a message that names a field."""

BY_LAW: tuple[dict[str, Any], ...] = (
    {"layer_max_decode": 1},
    {"layer_chunks": False},
    {"layer_cache": "none"},
    {"lse_backward": False},
    {"backward": ()},
    {"lse": False},
    {"attention_sink": False},
    {"topk_length": False},
)
"""What takes whole laws away, the least first."""

MULTIPLES = (16, 8, 4, 2)


def narrowing(history: History) -> str:
    """A field of ``Supports`` with its value, as Python has it; "" where none would tell the cases apart."""
    failing, passing = ([case for case, failed in history if failed is which] for which in (True, False))
    if not failing or not passing:
        return ""
    options: tuple[tuple[str, Callable[[Any], bool]], ...] = OPTIONS
    if isinstance(failing[0], LayerCase):
        options = LAYER_OPTIONS
    for text, excluded in options:
        if all(map(excluded, failing)) and not any(map(excluded, passing)):
            return text
    return next(_learned(failing, passing), "") if len(passing) >= FEWEST else ""


def declaration(laws: Iterable[str], found: Iterable[str]) -> str:
    """The field that helps where ``laws`` crash alike, of those that were ``found`` in their cases; "" where none does.

    Where the cases tell nothing, it is one that takes all of these laws away. Of several limits the widest is meant.
    """
    fields: dict[str, list[str]] = {}
    for text in found:
        fields.setdefault(text.partition("=")[0], []).append(text)
    if fields:
        name, texts = max(fields.items(), key=lambda each: len(each[1]))
        if "_min_" in name or "max_" in name:
            return (min if "_min_" in name else max)(texts, key=lambda text: int(text.partition("=")[2]))
        return max(texts, key=texts.count)
    needed = [law for name in laws if (law := all_laws().get(name))]
    for declared in BY_LAW:
        if needed and all(law.missing(Supports(**declared)) for law in needed):
            return ", ".join(f"{name}={value!r}" for name, value in declared.items())
    return ""


def _learned(failing: list[Case], passing: list[Case]) -> Iterator[str]:
    """Limits, multiples and few values whose numbers the cases tell."""
    for field, size in _SIZES:
        crashes, works = ([size(case) for case in cases] for cases in (failing, passing))
        if min(crashes) > max(works) > 0:
            yield f"{field}={max(works) + (field == 'layer_max_positions')}"
    if not isinstance(failing[0], LayerCase):
        return
    crashes, works = ([n for case in cases if (n := vars(case)["qk_rope_head_dim"])] for cases in (failing, passing))
    if len(crashes) == len(failing) and works and max(crashes) < (least := min(works)):
        yield f"layer_min_rope_dim={least}"
    for name in LAYER_DIMS:
        crashes, works = (
            [getattr(case, name) for case in cases if getattr(case, name)] for cases in (failing, passing)
        )
        for multiple in MULTIPLES:
            if crashes and all(dim % multiple for dim in crashes) and not any(dim % multiple for dim in works):
                yield f"layer_multiples=(({name!r}, {multiple}),)"
    thetas = {theta for case in passing if (theta := _theta(case)) is not None}
    if 0 < len(thetas) < FEWEST and all(_theta(case) not in (None, *thetas) for case in failing):
        yield f"layer_thetas={tuple(sorted(thetas))}"


def _theta(case: Any) -> float | None:
    return None if case.config.rope is None else float(case.config.rope.theta)


def _batch(case: Any) -> int:
    lengths = getattr(case, "seqlens_k", getattr(case, "seqlens", None))
    return getattr(case, "batch", 0) if lengths is None else len(lengths)


def _keys(case: Any) -> int:
    if isinstance(case, LayerCase):
        return case.prompt + case.steps
    return max(getattr(case, "seqlens_k", getattr(case, "seqlens", (getattr(case, "topk", 0),))), default=0)


def _end(case: Any) -> int:
    """The largest position of a layer's tokens."""
    return case.start + case.prompt + case.steps + 5 * case.batch - 6 if isinstance(case, LayerCase) else 0


_SIZES: tuple[tuple[str, Callable[[Any], int]], ...] = (
    ("max_s", lambda case: getattr(case, "s", 0)),
    ("max_batch", _batch),
    ("max_keys", _keys),
    ("layer_max_positions", _end),
)
