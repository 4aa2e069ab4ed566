"""The text of ``mla-spec cache``."""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.reference.cache import CacheSize, compared_cache_sizes, kv_heads_on_ranks
from mla_spec.reference.cache_layout import layout_of
from mla_spec.reference.checkpoint import find_model
from mla_spec.reference.formats import format_of
from mla_spec.reference.published import PublishedModel
from mla_spec.text.table import format_table

INDEXER_LAYOUTS = ("indexer_fp8", "indexer_mxfp4")
"""Of the keys of an indexer; the first is what engines store them in unless told otherwise."""


def compared_sizes(model: PublishedModel) -> list[CacheSize]:
    """What MHA, GQA and MQA with a model's heads would cache; none where the number of heads is not published."""
    f = model.fields
    if f["num_attention_heads"] is None:
        return []
    k_dim = f["qk_nope_head_dim"] + f["qk_rope_head_dim"]
    return compared_cache_sizes(f["num_attention_heads"], k_dim, f["v_head_dim"])


@dataclass(frozen=True)
class _Cache:
    """One row of the report: a kind of cache, with bytes of one layer and of a token and a page in all layers.

    ``elements`` and ``bytes_per_token`` are None where layers cache different things.
    """

    name: str
    elements: int | None
    bytes_per_token: int | None
    token_in_layers: int
    page_in_layers: int
    kv_heads: int = 1

    @classmethod
    def of(cls, name: str, rows: list[tuple[int, int]], itemsize: int, page_size: int, kv_heads: int = 1) -> _Cache:
        """Of rows (layers, elements); the first are the widest."""
        token = sum(layers * elements for layers, elements in rows) * itemsize
        elements = rows[0][1]
        return cls(name, elements, elements * itemsize, token, page_size * token, kv_heads)

    def __add__(self, other: _Cache) -> _Cache:
        """Two caches that every rank has whole."""
        token, page = self.token_in_layers + other.token_in_layers, self.page_in_layers + other.page_in_layers
        return _Cache(f"{self.name}+{other.name}", None, None, token, page)

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


def _indexer_keys(model: PublishedModel, layout: str | None, dtype: str, page_size: int) -> _Cache | None:
    """The keys of the model's indexer: in ``layout`` where that is one of theirs, else in 8 bits, as engines store them.

    Keys of another width than the layouts' are in ``dtype``. None without an indexer, and where keys are pooled over tokens.
    """
    f = model.fields
    if not f.get("num_indexer_layers") or f.get("index_kpool"):
        return None
    if f["index_head_dim"] != layout_of(INDEXER_LAYOUTS[0]).width:
        rows = [(f["num_indexer_layers"], f["index_head_dim"])]
        return _Cache.of("indexer", rows, format_of(dtype).itemsize, page_size)
    return _in_layout(model, layout if layout in INDEXER_LAYOUTS else INDEXER_LAYOUTS[0], page_size)


def cache_report(
    name: str, dtype: str, tokens: int, batch: int, page_size: int, layout: str | None = None, tensor_parallel: int = 1
) -> str:
    """Exact bytes per token and layer, per token, and of a whole cache, beside MHA, GQA and MQA with the same heads.

    ``name`` is a published model's, or the path of a configuration. The keys of an indexer, and the latents with them, are
    rows of their own. KB are 1000 bytes, as in papers; GiB are 2^30, as in engines.

    With ``layout`` the cache in that quantised layout comes first, and the others are compared with it; ``dtype`` is that
    of the others. With ``tensor_parallel`` ranks the bytes of the fullest rank and of all ranks follow, and caches are
    compared by what is on a rank.

    Raises:
        ValueError: unknown model, unreadable configuration, unknown dtype or layout, a count below 1, a model without published
            layers, one whose rows have another width than the layout's, or ranks that do not divide its heads.
    """
    counts = {"tokens": tokens, "batch": batch, "page size": page_size, "tp": tensor_parallel}
    for label, count in counts.items():
        if count < 1:
            raise ValueError(f"{label} must be at least 1, got {count}")
    itemsize = format_of(dtype).itemsize
    model = find_model(name)
    rows, num_heads = model.latent_rows(), model.fields["num_attention_heads"]
    layers = sum(count for count, _ in rows)
    if num_heads is None and tensor_parallel > 1:
        raise ValueError(f"{model.name}: the number of heads {model.absent}")
    caches = [_Cache.of("MLA", rows, itemsize, page_size)]
    caches += [
        _Cache.of(size.attention, [(layers, size.elements)], itemsize, page_size, size.kv_heads)
        for size in compared_sizes(model)
    ]
    if layout is not None:
        caches.insert(0, _in_layout(model, layout, page_size))
    if (keys := _indexer_keys(model, layout, dtype, page_size)) is not None:
        latents = next(cache for cache in caches if cache.name not in INDEXER_LAYOUTS)
        caches += [latents + keys] if layout in INDEXER_LAYOUTS else [keys, latents + keys]
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
    table = [(*header, f"{caches[0].name} is", "KB/token", "in pages")]
    first = max(caches[0].on_ranks(pages, num_heads, ranks))
    for cache in caches:
        on_ranks = cache.on_ranks(pages, num_heads, ranks)
        cells = [cache.elements, cache.bytes_per_token, cache.token_in_layers, pages * cache.page_in_layers]
        cells += [max(on_ranks), sum(on_ranks)] if ranks > 1 else []
        share = "" if cache is caches[0] else f"{100 * first / max(on_ranks):.1f} %"
        units = f"{cache.token_in_layers / 1000:.3f}", binary_size(pages * cache.page_in_layers)
        table.append((cache.name, *("" if cell is None else str(cell) for cell in cells), share, *units))
    return table


def binary_size(count: int) -> str:
    """Bytes in the largest binary unit that they fill, to three decimals, e.g. "65.484 GiB"."""
    units = [(2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")]
    for size, unit in units:
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return f"{count} B"


def _notes(model: PublishedModel, first: str, ranks: int) -> list[str]:
    """What the table does not say."""
    notes = [f"{layers} layers cache {elements} elements" for layers, elements in model.latent_rows()[1:]]
    if model.fields.get("index_kpool"):
        notes.append("the keys of the indexer are pooled over tokens, and not counted")
    if ranks > 1:
        notes.append(f"every rank has all of the {first} cache; the heads of MHA and GQA are divided")
    if not model.verified:
        notes.append("the entry as a whole is not verified")
    return notes + [f"not verified: {field}" for field in model.unverified_fields]
