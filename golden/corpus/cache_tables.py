"""Exact cache sizes of the published models: every model, format and layout, in pages of 1 to 128 tokens."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mla_spec.reference.cache import CacheSize, compared_cache_sizes, kv_heads_on_ranks
from mla_spec.reference.cache_layout import LAYOUTS, CacheLayout
from mla_spec.reference.formats import format_of
from mla_spec.reference.published import PublishedModel, published_models

PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
"""Formats of caches without scales; one scale of the whole tensor takes no space in them."""

LATENT_LAYOUTS = ("fp8_per_tensor", "fp8_ds_mla", "nvfp4_ds_mla")
INDEXER_LAYOUTS = ("indexer_fp8", "indexer_mxfp4")
RANKS = (1, 2, 4, 8, 16)


def layouts() -> list[dict[str, Any]]:
    """Bytes per token and per page of each layout, in one layer."""
    return [
        {
            "layout": layout.name,
            "elements_per_token": layout.width,
            "bytes_per_token": layout.bytes_per_token,
            "page_alignment": layout.page_alignment,
            "bytes_per_page": [layout.bytes_per_page(size) for size in PAGE_SIZES],
        }
        for layout in LAYOUTS.values()
    ]


def frozen_models() -> list[PublishedModel]:
    """The models of the tables, which are frozen: what came later has ``since``, and `mla-spec cache` gives its sizes."""
    return [model for model in published_models().values() if "since" not in model.fields]


def caches(model: PublishedModel) -> list[dict[str, Any]]:
    """The latent cache of an MLA model, and the keys of its indexer where it has one."""
    f = model.fields
    found: list[tuple[str, int, int, tuple[str, ...], tuple[str, ...]]] = [
        ("latent", layers, elements, DTYPES, LATENT_LAYOUTS) for layers, elements in model.latent_rows()
    ]
    if f.get("num_indexer_layers"):
        # Indexer keys are stored in 8 bits or fewer by every published engine; bfloat16 is what the model computes.
        found.append(("indexer", f["num_indexer_layers"], f["index_head_dim"], ("bfloat16",), INDEXER_LAYOUTS))
    return [
        {
            "cache": name,
            "layers": layers,
            "elements_per_token_and_layer": width,
            "formats": {
                **{dtype: _plain(width * format_of(dtype).itemsize, layers) for dtype in dtypes},
                **{each: _laid_out(LAYOUTS[each], layers) for each in fitting if LAYOUTS[each].width == width},
            },
        }
        for name, layers, width, dtypes, fitting in found
    ]


def _plain(row: int, layers: int) -> dict[str, Any]:
    return {
        "bytes_per_token_in_all_layers": layers * row,
        "bytes_per_page_in_all_layers": [layers * size * row for size in PAGE_SIZES],
    }


def _laid_out(layout: CacheLayout, layers: int) -> dict[str, Any]:
    return {
        "bytes_per_token_in_all_layers": layers * layout.bytes_per_token,
        "bytes_per_page_in_all_layers": [layers * layout.bytes_per_page(size) for size in PAGE_SIZES],
    }


def tensor_parallel(model: PublishedModel, sizes: list[CacheSize]) -> list[dict[str, Any]]:
    """Bytes per token of the fullest rank and of all ranks, in bfloat16 and all layers, beside MHA, GQA and MQA."""
    num_heads, layers = model.fields["num_attention_heads"], model.num_cached_layers
    assert layers is not None
    latent = sum(count * elements for count, elements in model.latent_rows()) * format_of("bfloat16").itemsize
    rows = []
    for ranks in (ranks for ranks in RANKS if num_heads % ranks == 0):
        row: dict[str, Any] = {"ranks": ranks, "MLA": [latent, ranks * latent]}
        for size in sizes:
            heads = kv_heads_on_ranks(num_heads, size.kv_heads, ranks)
            whole = size.bytes_per_token("bfloat16", layers)
            row[size.attention] = [whole * max(heads) // size.kv_heads, whole * sum(heads) // size.kv_heads]
        rows.append(row)
    return rows


def shared_kv_models() -> list[dict[str, Any]]:
    """DeepSeek-V4, whose rows are keys and values of one head, is not MLA.

    A layer that compresses by m stores one row for every m tokens, those that compress by 4 a key of the indexer with it;
    every layer stores the rows of its sliding window too. Bytes per token are exact fractions.
    """
    row = LAYOUTS["deepseek_v4"]
    models = []
    for model in frozen_models():
        f = model.fields
        if "compressed_layers" not in f:
            continue
        rows = sum((Fraction(count, int(ratio)) for ratio, count in f["compressed_layers"].items()), Fraction(0))
        keys = Fraction(f["compressed_layers"]["4"], 4)
        models.append(
            {
                "model": model.name,
                "verified": model.verified,
                "layers": f["num_hidden_layers"],
                "layout": row.name,
                "rows_per_token": str(rows),
                "indexer_keys_per_token": str(keys),
                "bytes_per_token": {
                    name: str(rows * row.bytes_per_token + keys * LAYOUTS[name].bytes_per_token)
                    for name in INDEXER_LAYOUTS
                },
                "bytes_of_sliding_windows": f["num_hidden_layers"] * f["sliding_window"] * row.bytes_per_token,
            }
        )
    return models


def cache_sizes() -> dict[str, Any]:
    """The content of cache_sizes.json: every frozen model whose layers are known, in every format and layout."""
    models = []
    for model in frozen_models():
        layers, fields = model.num_cached_layers, model.fields
        if not model.is_mla or layers is None:
            continue
        elements = {"and_layer": fields["kv_lora_rank"] + fields["qk_rope_head_dim"]}
        elements["in_all_layers"] = sum(count * each for count, each in model.latent_rows())
        models.append(
            {
                "model": model.name,
                "verified": model.verified,
                "cached_layers": layers,
                "elements_per_token_and_layer": elements["and_layer"],
                **{
                    f"{dtype}_bytes_per_token_{unit}": count * format_of(dtype).itemsize
                    for dtype in ("bfloat16", "float32")
                    for unit, count in elements.items()
                },
                "caches": caches(model),
                "bfloat16_bytes_per_token_on_a_rank_and_on_all_ranks": tensor_parallel(model, compared_with(model)),
            }
        )
    return {
        "models": models,
        "page_sizes": list(PAGE_SIZES),
        "layouts": layouts(),
        "shared_kv_models": shared_kv_models(),
    }


def compared_with(model: PublishedModel) -> list[CacheSize]:
    """What MHA, GQA and MQA with a model's heads would cache."""
    f = model.fields
    return compared_cache_sizes(
        f["num_attention_heads"], f["qk_nope_head_dim"] + f["qk_rope_head_dim"], f["v_head_dim"]
    )
