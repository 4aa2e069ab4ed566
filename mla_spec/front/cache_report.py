"""The text of ``mla-spec cache``."""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.reference.cache import CacheSize, compared_cache_sizes, kv_heads_on_ranks
from mla_spec.reference.cache_layout import layout_of
from mla_spec.reference.formats import format_of
from mla_spec.reference.published import PublishedModel, published_model
from mla_spec.text.table import format_table


def compared_sizes(model: PublishedModel) -> list[CacheSize]:
    """What MHA, GQA and MQA with a model's heads would cache; none where the number of heads is not published."""
    f = model.fields
    if f["num_attention_heads"] is None:
        return []
    k_dim = f["qk_nope_head_dim"] + f["qk_rope_head_dim"]
    return compared_cache_sizes(f["num_attention_heads"], k_dim, f["v_head_dim"])


@dataclass(frozen=True)
class _Cache:
    """One row of the report: a kind of cache, with bytes of one layer and of a token and a page in all layers."""

    name: str
    elements: int
    bytes_per_token: int
    token_in_layers: int
    page_in_layers: int
    kv_heads: int = 1

    @classmethod
    def of(cls, name: str, rows: list[tuple[int, int]], itemsize: int, page_size: int, kv_heads: int = 1) -> _Cache:
        """Of rows (layers, elements); the first are the widest."""
        token = sum(layers * elements for layers, elements in rows) * itemsize
        elements = rows[0][1]
        return cls(name, elements, elements * itemsize, token, page_size * token, kv_heads)

    def on_ranks(self, pages: int, num_heads: int | None, ranks: int) -> list[int]:
        """Bytes on each rank of tensor parallelism."""
        whole = pages * self.page_in_layers
        if ranks == 1 or num_heads is None:
            return [whole]
        return [whole * heads // self.kv_heads for heads in kv_heads_on_ranks(num_heads, self.kv_heads, ranks)]


def _in_layout(model: PublishedModel, layout_name: str, page_size: int) -> _Cache:
    """The model's latent cache, or the keys of its indexer, in a quantised layout; ValueError where it has none so wide."""
    layout, f = layout_of(layout_name), model.fields
    caches = [model.latent_rows()]
    if f.get("num_indexer_layers"):
        caches.append([(f["num_indexer_layers"], f["index_head_dim"])])
    for rows in caches:
        if all(elements == layout.width for _, elements in rows):
            layers = sum(count for count, _ in rows)
            token, page = layout.bytes_per_token, layout.bytes_per_page(page_size)
            return _Cache(layout.name, layout.width, token, layers * token, layers * page)
    widths = " and ".join(str(elements) for rows in caches for _, elements in rows)
    raise ValueError(f"{layout.name} stores rows of {layout.width} elements; {model.name} caches rows of {widths}")


def cache_report(
    name: str, dtype: str, tokens: int, batch: int, page_size: int, layout: str | None = None, tensor_parallel: int = 1
) -> str:
    """Exact bytes per token and layer, per token, and of a whole cache, beside MHA, GQA and MQA with the same heads.

    With ``layout`` the cache in that quantised layout comes first, and the others are compared with it; ``dtype`` is that
    of the others. With ``tensor_parallel`` ranks the bytes of the fullest rank and of all ranks follow, and caches are
    compared by what is on a rank.

    Raises:
        ValueError: unknown model, dtype or layout, a count below 1, a model without published layers, one whose rows have
            another width than the layout's, or ranks that do not divide its heads.
    """
    counts = {"tokens": tokens, "batch": batch, "page size": page_size, "tp": tensor_parallel}
    for label, count in counts.items():
        if count < 1:
            raise ValueError(f"{label} must be at least 1, got {count}")
    itemsize = format_of(dtype).itemsize
    model = published_model(name)
    rows, num_heads = model.latent_rows(), model.fields["num_attention_heads"]
    layers = sum(count for count, _ in rows)
    if num_heads is None and tensor_parallel > 1:
        raise ValueError(f"{model.name}: the number of heads is not published")
    caches = [_Cache.of("MLA", rows, itemsize, page_size)]
    caches += [
        _Cache.of(size.attention, [(layers, size.elements)], itemsize, page_size, size.kv_heads)
        for size in compared_sizes(model)
    ]
    if layout is not None:
        caches.insert(0, _in_layout(model, layout, page_size))
    title = f"{model.name}: {layers} cached layers, {dtype}, {batch} × {tokens} tokens in pages of {page_size}"
    if tensor_parallel > 1:
        title += f", {tensor_parallel} ranks of tensor parallelism"
    table = _table(caches, batch * -(-tokens // page_size), num_heads, tensor_parallel)
    return "\n".join([title, format_table(table), *_notes(model, caches[0].name, tensor_parallel)])


def _table(caches: list[_Cache], pages: int, num_heads: int | None, ranks: int) -> list[tuple[str, ...]]:
    """A header, and a row for each cache."""
    header = ["attention", "elements/token/layer", "B/token/layer", "B/token", "B in pages"]
    if ranks > 1:
        header += ["B on a rank", f"B on {ranks} ranks"]
    table = [(*header, f"{caches[0].name} is")]
    first = max(caches[0].on_ranks(pages, num_heads, ranks))
    for cache in caches:
        on_ranks = cache.on_ranks(pages, num_heads, ranks)
        cells = [cache.elements, cache.bytes_per_token, cache.token_in_layers, pages * cache.page_in_layers]
        cells += [max(on_ranks), sum(on_ranks)] if ranks > 1 else []
        share = "" if cache is caches[0] else f"{100 * first / max(on_ranks):.1f} %"
        table.append((cache.name, *map(str, cells), share))
    return table


def _notes(model: PublishedModel, first: str, ranks: int) -> list[str]:
    """What the table does not say."""
    notes = [f"{layers} layers cache {elements} elements" for layers, elements in model.latent_rows()[1:]]
    if ranks > 1:
        notes.append(f"every rank has all of the {first} cache; the heads of MHA and GQA are divided")
    if not model.verified:
        notes.append("the entry as a whole is not verified")
    return notes + [f"not verified: {field}" for field in model.unverified_fields]
