"""The text of ``mla-spec cache``."""

from __future__ import annotations

import numpy as np

from mla_spec.harness.report import format_table
from mla_spec.reference.cache import CacheSize, compared_cache_sizes, paged_bytes
from mla_spec.reference.formats import format_of
from mla_spec.reference.published import PublishedModel, published_model


def cache_sizes(model: PublishedModel) -> list[CacheSize]:
    """MLA's cache of a model first, then what MHA, GQA and MQA with its heads would need.

    Raises:
        ValueError: the model is not MLA, or a dimension is not published.
    """
    f = model.fields
    if not model.is_mla:
        raise ValueError(f"{model.name}: attention is {f['attention']!r}, not MLA")
    sizes = [CacheSize("MLA", f["kv_lora_rank"] + f["qk_rope_head_dim"])]
    if f["num_attention_heads"] is not None:
        k_dim = f["qk_nope_head_dim"] + f["qk_rope_head_dim"]
        sizes += compared_cache_sizes(f["num_attention_heads"], k_dim, f["v_head_dim"])
    return sizes


def cache_report(name: str, dtype: str, tokens: int, batch: int, page_size: int) -> str:
    """Exact bytes per token and layer, per token, and of a whole cache, beside MHA, GQA and MQA with the same heads.

    Raises:
        ValueError: unknown model or dtype, a count below 1, or a model without published layers.
    """
    for label, count in (("tokens", tokens), ("batch", batch), ("page size", page_size)):
        if count < 1:
            raise ValueError(f"{label} must be at least 1, got {count}")
    itemsize = format_of(dtype).itemsize
    model = published_model(name)
    layers = model.num_cached_layers
    if layers is None:
        raise ValueError(f"{model.name}: the number of layers is not published")
    sizes = cache_sizes(model)
    rows = [("attention", "elements/token/layer", "B/token/layer", "B/token", "B in pages", "MLA is")]
    for size in sizes:
        per_token = size.bytes_per_token(dtype, layers)
        whole = layers * paged_bytes(np.full(batch, tokens), page_size, size.elements * itemsize)
        share = 100 * sizes[0].elements / size.elements
        rows.append(
            (
                size.attention,
                str(size.elements),
                str(size.elements * itemsize),
                str(per_token),
                str(whole),
                "" if size is sizes[0] else f"{share:.1f} %",
            )
        )
    title = f"{model.name}: {layers} cached layers, {dtype}, {batch} × {tokens} tokens in pages of {page_size}"
    notes = [f"not verified: {field}" for field in model.unverified_fields]
    if not model.verified:
        notes.insert(0, "the entry as a whole is not verified")
    return "\n".join([title, format_table(rows), *notes])
