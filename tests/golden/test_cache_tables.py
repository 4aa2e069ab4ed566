"""The golden tables of cache sizes against numbers worked out by hand, and against figures in print."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest

from mla_spec.golden.corpus import cache_tables, corpus, figures
from mla_spec.golden.corpus.error import CorpusError
from mla_spec.reference.published import published_models


@pytest.fixture(scope="module")
def sizes() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((corpus.installed() / "cache_sizes.json").read_text(encoding="utf-8"))
    return stored


def cache_of(sizes: dict[str, Any], model: str, cache: str = "latent") -> dict[str, Any]:
    entry = next(entry for entry in sizes["models"] if entry["model"] == model)
    found: dict[str, Any] = next(each for each in entry["caches"] if each["cache"] == cache)
    return found


def test_every_frozen_model_with_published_layers_is_there(sizes: dict[str, Any]) -> None:
    mla = [m.name for m in cache_tables.frozen_models() if m.is_mla and m.num_cached_layers is not None]
    assert len(published_models()) > len(cache_tables.frozen_models()) > len(mla)
    assert [entry["model"] for entry in sizes["models"]] == mla
    assert [entry["model"] for entry in sizes["shared_kv_models"]] == ["DeepSeek-V4-Flash", "DeepSeek-V4-Pro"]


def test_pages_of_deepseek_v3(sizes: dict[str, Any]) -> None:
    formats = cache_of(sizes, "DeepSeek-V3")["formats"]
    rows = {"float32": 2304, "bfloat16": 1152, "float16": 1152, "float8_e4m3fn": 576, "fp8_per_tensor": 576}
    rows |= {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}
    assert {name: made["bytes_per_token_in_all_layers"] for name, made in formats.items()} == {
        name: 61 * row for name, row in rows.items()
    }
    for name, row in rows.items():
        pages = [61 * row * size for size in (1, 2, 4, 8, 16, 32, 64, 128)]
        assert formats[name]["bytes_per_page_in_all_layers"] == pages


def test_pages_are_aligned(sizes: dict[str, Any]) -> None:
    pages = {layout["layout"]: layout["bytes_per_page"] for layout in sizes["layouts"]}
    assert sizes["page_sizes"] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert pages["deepseek_v4"] == [576 * n for n in (2, 3, 5, 9, 17, 33, 65, 130)]
    assert pages["deepseek_v4_1"] == [512 * n for n in (2, 3, 5, 9, 17, 33, 66, 132)]
    assert pages["indexer_fp8"][6] == 8448


def test_indexer_keys(sizes: dict[str, Any]) -> None:
    keys = cache_of(sizes, "GLM-5.2 / 5.3", "indexer")
    assert keys["layers"] == 21
    assert {name: made["bytes_per_token_in_all_layers"] for name, made in keys["formats"].items()} == {
        "bfloat16": 21 * 256,
        "indexer_fp8": 21 * 132,
        "indexer_mxfp4": 21 * 68,
    }


def test_narrow_latents_have_no_layout_of_576(sizes: dict[str, Any]) -> None:
    assert set(cache_of(sizes, "Mistral-Small-4-119B-2603")["formats"]) == set(cache_tables.DTYPES)


def test_layers_without_rotary_embedding(sizes: dict[str, Any]) -> None:
    entry = next(entry for entry in sizes["models"] if entry["model"] == "Mistral-Large-4-1T-A52B")
    latents = [(each["layers"], each["elements_per_token_and_layer"]) for each in entry["caches"]]
    assert latents == [(54, 576), (18, 512), (72, 128)]
    assert entry["bfloat16_bytes_per_token_in_all_layers"] == 2 * (54 * 576 + 18 * 512)


def test_deepseek_v4(sizes: dict[str, Any]) -> None:
    flash, pro = sizes["shared_kv_models"]
    assert Fraction(flash["bytes_per_token"]["indexer_fp8"]) == Fraction(21, 4) * (584 + 132) + Fraction(20, 128) * 584
    assert Fraction(pro["bytes_per_token"]["indexer_mxfp4"]) == Fraction(30, 4) * (584 + 68) + Fraction(31, 128) * 584
    assert flash["bytes_of_sliding_windows"] == 43 * 128 * 584


def test_ranks(sizes: dict[str, Any]) -> None:
    entry = next(entry for entry in sizes["models"] if entry["model"] == "GLM-4.7-Flash")
    rows = {row["ranks"]: row for row in entry["bfloat16_bytes_per_token_on_a_rank_and_on_all_ranks"]}
    assert set(rows) == {1, 2, 4}  # 20 heads
    assert rows[4]["MLA"] == [54144, 4 * 54144]
    assert rows[4]["MHA"] == [962560 // 4, 962560]
    assert rows[4]["MQA"] == [48128, 4 * 48128]


@pytest.mark.parametrize("figure", figures.figures(), ids=lambda figure: figure.name)
def test_figures_in_print_are_reproduced(figure: figures.Figure) -> None:
    figure.record()
    decimals = len(figure.published.partition(".")[2])
    wrong = Fraction(figure.published) + Fraction(2, 10**decimals)
    with pytest.raises(CorpusError, match="computes to"):
        figures.Figure(**{**vars(figure), "published": f"{float(wrong):.{decimals}f}"}).record()
