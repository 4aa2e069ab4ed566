"""Subjects that are given the dims of one model only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.reference.published import PublishedModel
from mla_spec.subjects.contract import subject_name, supports_of
from mla_spec.subjects.find import UnknownSubject, resolve_subject

Dims = tuple[tuple[str, Any], ...]
"""Pairs of a field of ``Supports`` and the only value that is drawn."""


def dims_of(model: PublishedModel) -> Dims:
    """What kernels of this model are called with: heads, latent rows, and heads of expanded keys and values.

    Widths of whole layers stay small: none is a kernel's.

    Raises:
        ValueError: the model is not MLA, or does not state a dimension.
    """
    if not model.is_mla:
        raise ValueError(f"{model.name}: attention is {model.fields['attention']!r}, not MLA")
    nope, rope = model.required("qk_nope_head_dim"), model.required("qk_rope_head_dim")
    dims = {
        "num_heads": model.required("num_attention_heads"),
        "latent_dims": (model.required("kv_lora_rank"), rope),
        "prefill_dims": (nope + rope, model.required("v_head_dim")),
    }
    if model.fields.get("index_head_dim"):
        dims["indexer_dims"] = model.required("index_n_heads"), model.required("index_head_dim")
    return tuple(dims.items())


def configured_subject(spec: str, signature: str | None = None, dims: Dims = ()) -> Any:
    """``resolve_subject``, with ``supports`` narrowed to these dims.

    Raises:
        UnknownSubject: the subject does not exist, does not support the dims, or its ``supports`` cannot be set.
    """
    subject = resolve_subject(spec, signature)
    if not dims:
        return subject
    supports, name = supports_of(subject), subject_name(subject)
    for field, value in dims:
        declared = getattr(supports, field)
        if declared is not None and value not in declared:
            raise UnknownSubject(f"{name} supports {field}={declared!r}, not {value!r} of the configuration")
    only: dict[str, Any] = {field: (value,) for field, value in dims}
    try:
        subject.supports = replace(supports, **only)
    except (AttributeError, TypeError) as error:
        raise UnknownSubject(f"{name}: supports cannot be set to the dims of a configuration: {error}") from error
    return subject
