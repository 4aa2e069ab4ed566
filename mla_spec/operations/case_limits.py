"""What the fields of a case may be: its id may come from anybody."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Final

from mla_spec.operations.case import Case
from mla_spec.operations.layer import layer_models
from mla_spec.operations.quantised_cache import HEAD_DIM_V
from mla_spec.operations.rope import LONGROPE, YARN
from mla_spec.operations.sinks import SINKS
from mla_spec.reference.cache_layout import LAYOUTS
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.terminal import shown

MOST: Final = 2**28
"""Elements of one array, or of the scores of one attention; 2 GiB in float64."""

_NONE_ALLOWED = frozenset(
    [
        "batch",
        "heads",
        "qk_rope_head_dim",
        "rank",
        "rope_dim",
        "shared_pages",
        "start",
        "steps",
        "seed",
        "seqlens",
        "seqlens_q",
        "seqlens_k",
        "window",
        "skipped_run",
    ]
)
"""Integers that may be 0."""

_SHARES = frozenset(("empty", "invalid", "skipped"))
"""Parts of a whole."""

_SIGNED = frozenset(("lse_mean",))


def _known(case: Case) -> dict[str, tuple[str, ...]]:
    """The words that each field of text may hold."""
    return {
        "dtype": DTYPES,
        "regime": case.known_regimes,
        "layout": ("interleaved", "half", *(("none",) if hasattr(case, "model") else ())),
        "yarn": tuple(YARN),
        "longrope": tuple(LONGROPE),
        "sink": SINKS,
        "weights": ("dense", "aligned"),
        "output_gate": ("none", "head", "element", "query"),
        "model": ("none", *layer_models()) if hasattr(case, "model") else (),
        "format": tuple(HEAD_DIM_V if case.kind == "quantised-decode" else LAYOUTS),
    }


def fault(case: Case) -> str:
    """Why no input should be built of a case, as a clause that names the field, or ""."""
    known = _known(case)
    for field in fields(case):
        value = getattr(case, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if why := _fault_of(field.name, each, known.get(field.name, ())):
                return f"{field.name} is {shown(each)}; expected {why}"
        if value == ():
            return f"{field.name} is empty; expected one or more integers joined by +"
    for what, count in elements(case).items():
        if count > MOST:
            return f"its {what} have {count} elements; expected at most {MOST}"
    return ""


def _fault_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    """What was expected in the place of a value, or ""."""
    if isinstance(value, str):
        return "" if value in known else f"one of {', '.join(known)}"
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int):
        least, most = int(name not in _NONE_ALLOWED), 2**63 if name == "seed" else 2**31
        return "" if least <= value < most else f"an integer of {least} to {most - 1}"
    if name in _SIGNED:
        return "" if math.isfinite(value) else "a finite number"
    top = 1.0 if name in _SHARES else 1e300
    return "" if 0 <= value <= top else f"a number of 0 to {top:g}"


def elements(case: Case) -> dict[str, int]:
    """How large the arrays of a case are, about, by what they hold."""
    get = vars(case).get
    lengths, packed = get("seqlens_k", get("seqlens", ())), get("seqlens_q")
    width = max(get(name, 0) or 0 for name in _WIDTHS) + get("qk_rope_head_dim", 0) + get("qk_nope_head_dim", 0)
    heads = max(get("num_heads", 1), get("heads", 1), get("index_n_heads", 1), get("attention_heads", 1))
    s = get("s", 1) * get("s_q", 1) if packed is None else 1
    tokens = get("prompt", 0) + get("steps", 0)
    queries = max(sum(packed or ()), (len(lengths) or 1) * s, get("batch", 1) * max(s, tokens), get("tokens", 1))
    longest = max(*lengths, 0, get("s_kv", 0), tokens, get("pages", 0) * get("page_size", 1))
    page = get("page_size", 1)
    own = sum(-(-length // page) for length in lengths) * page
    pool = get("shared_pages", 0) * page or own or longest
    seen = min(longest, get("topk", longest)) if "topk" in vars(case) else longest
    return {
        "queries": queries * heads * width * get("parts", 1),
        "keys": (pool + 3 * page) * width * (heads if case.kind.startswith(("prefill", "ring", "layer")) else 1),
        "scores": queries * heads * seen if packed is None else _pairs(packed, lengths) * heads,
        "indices": queries * max(get("topk", 0), get("top_k", 0)),
        "block tables": len(lengths) * (longest // page + 2),
        "weights": get("rows", 1) * get("columns", 1)
        + get("hidden_size", 1) * heads * width
        + get("head_dim", 1) * heads,
    }


_WIDTHS = (
    "kv_lora_rank", "q_lora_rank", "qk_head_dim", "v_head_dim", "head_dim", "head_dim_v", "dim", "hidden_size",
    "index_head_dim", "rope_dim", "block_columns", "block_rows",
)  # fmt: skip


def _pairs(queries: tuple[int, ...], keys: tuple[int, ...]) -> int:
    return sum(q * k for q, k in zip(queries, keys, strict=False))
