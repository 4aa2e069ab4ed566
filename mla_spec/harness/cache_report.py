"""The text of ``mla-spec cache``."""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.harness.report import format_table
from mla_spec.reference.cache import CacheSize, compared_cache_sizes
from mla_spec.reference.cache_layout import layout_of
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


@dataclass(frozen=True)
class _Cache:
    """One row of the report: a kind of cache, its layers, and bytes of one layer."""

    name: str
    elements: int
    layers: int
    bytes_per_token: int
    bytes_per_page: int

    def cells(self, pages: int, first: _Cache) -> tuple[str, ...]:
        per_token = self.layers * self.bytes_per_token
        share = 100 * first.layers * first.bytes_per_token / per_token
        return (
            self.name,
            str(self.elements),
            str(self.bytes_per_token),
            str(per_token),
            str(self.layers * pages * self.bytes_per_page),
            "" if self is first else f"{share:.1f} %",
        )


def _in_layout(model: PublishedModel, layout_name: str, page_size: int) -> _Cache:
    """The model's latent cache, or the keys of its indexer, in a quantised layout; ValueError where it has none so wide."""
    layout, f = layout_of(layout_name), model.fields
    caches = [("num_mla_layers", f["kv_lora_rank"] + f["qk_rope_head_dim"])]
    if f.get("num_indexer_layers"):
        caches.append(("num_indexer_layers", f["index_head_dim"]))
    for layers, width in caches:
        if width == layout.width:
            return _Cache(layout.name, width, f[layers], layout.bytes_per_token, layout.bytes_per_page(page_size))
    widths = " and ".join(str(width) for _, width in caches)
    raise ValueError(f"{layout.name} stores rows of {layout.width} elements; {model.name} caches rows of {widths}")


def cache_report(name: str, dtype: str, tokens: int, batch: int, page_size: int, layout: str | None = None) -> str:
    """Exact bytes per token and layer, per token, and of a whole cache, beside MHA, GQA and MQA with the same heads.

    With ``layout`` the cache in that quantised layout comes first, and the others are compared with it; ``dtype`` is that
    of the others.

    Raises:
        ValueError: unknown model, dtype or layout, a count below 1, a model without published layers, or one whose rows
            have another width than the layout's.
    """
    for label, count in (("tokens", tokens), ("batch", batch), ("page size", page_size)):
        if count < 1:
            raise ValueError(f"{label} must be at least 1, got {count}")
    itemsize = format_of(dtype).itemsize
    model = published_model(name)
    layers = model.num_cached_layers
    if layers is None:
        raise ValueError(f"{model.name}: the number of layers is not published")
    caches = []
    for size in cache_sizes(model):
        row_bytes = size.elements * itemsize
        caches.append(_Cache(size.attention, size.elements, layers, row_bytes, page_size * row_bytes))
    if layout is not None:
        caches.insert(0, _in_layout(model, layout, page_size))
    pages = batch * -(-tokens // page_size)
    header = (
        "attention",
        "elements/token/layer",
        "B/token/layer",
        "B/token",
        "B in pages",
        f"{caches[0].name} is",
    )
    title = f"{model.name}: {layers} cached layers, {dtype}, {batch} × {tokens} tokens in pages of {page_size}"
    notes = [f"not verified: {field}" for field in model.unverified_fields]
    if not model.verified:
        notes.insert(0, "the entry as a whole is not verified")
    return "\n".join([title, format_table([header, *(cache.cells(pages, caches[0]) for cache in caches)]), *notes])
