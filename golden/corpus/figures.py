"""Published figures of cache sizes, next to the exact numbers that they round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mla_spec.golden.corpus.bounds import bounds
from mla_spec.golden.corpus.cache_tables import cache_sizes
from mla_spec.golden.corpus.error import CorpusError
from mla_spec.reference.cache import (
    CacheSize,
    latent_cache_size,
    multi_head_cache_size,
    reduction,
)
from mla_spec.reference.cache_layout import LAYOUTS
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.published import published_models

V2 = "DeepSeek-V2 (arXiv 2405.04434)"
V3_INSIGHTS = "Insights into DeepSeek-V3 (arXiv 2505.09343), table 1"


@dataclass(frozen=True)
class Figure:
    """A published number and the exact one it rounds.

    Attributes:
        published: as printed; its last digit is rounded to nearest.
        numbers: what ``exact`` is computed from by ``formula``.
    """

    name: str
    published: str
    unit: str
    source: str
    formula: str
    numbers: Mapping[str, int]
    exact: Fraction

    def record(self) -> dict[str, Any]:
        """The figure as plain JSON.

        Raises:
            CorpusError: ``exact`` does not round to ``published``.
        """
        decimals = len(self.published.partition(".")[2])
        if abs(self.exact - Fraction(self.published)) > Fraction(1, 2 * 10**decimals):
            raise CorpusError(
                f"headline_figures.json: {self.name} computes to {float(self.exact):.6g}; expected {self.published}"
            )
        return {
            "name": self.name,
            "published": self.published,
            "unit": self.unit,
            "source": self.source,
            "formula": self.formula,
            "numbers": dict(self.numbers),
            "exact": str(self.exact),
        }


def _latent() -> CacheSize:
    return latent_cache_size(MLAConfig.published("DeepSeek-V2"))


def _kilobytes(name: str, published: str, size: CacheSize, layers: int, formula: str, **numbers: int) -> Figure:
    return Figure(
        name,
        published,
        "KB per token (1 KB = 1000 B), bfloat16",
        V3_INSIGHTS,
        formula,
        {**numbers, "layers": layers, "bytes_per_element": 2},
        Fraction(size.bytes_per_token("bfloat16", layers), 1000),
    )


def _grouped(name: str, published: str, layers: int, groups: int, dim: int) -> Figure:
    size = multi_head_cache_size(groups, dim, dim, f"GQA-{groups}")
    formula = "2 · kv_heads · head_dim · layers · bytes_per_element / 1000"
    return _kilobytes(name, published, size, layers, formula, kv_heads=groups, head_dim=dim)


def _reduction(name: str, published: str, source: str, mla_bits: int) -> Figure:
    small, large = _latent().elements * 60 * mla_bits, multi_head_cache_size(8, 128, 128, "GQA-8").elements * 95 * 16
    return Figure(
        name,
        published,
        "% of the KV cache per token saved against DeepSeek-67B",
        source,
        "100 · (1 − mla_elements · mla_layers · mla_bits / (2 · kv_heads · head_dim · layers · bits))",
        {
            "mla_elements": _latent().elements,
            "mla_layers": 60,
            "mla_bits": mla_bits,
            "kv_heads": 8,
            "head_dim": 128,
            "layers": 95,
            "bits": 16,
        },
        100 * reduction(small, large),
    )


def _thousands(name: str, published: str, size: CacheSize, layers: int, formula: str, **numbers: int) -> Figure:
    return Figure(
        name,
        published,
        "thousand elements per token",
        f"{V2}, table 9",
        formula,
        {**numbers, "layers": layers},
        Fraction(size.elements * layers, 1000),
    )


def _token_in(layout: str, published: str, source: str, formula: str, **numbers: int) -> Figure:
    exact = Fraction(LAYOUTS[layout].bytes_per_token)
    return Figure(f"{layout}, one token", published, "B per token and layer", source, formula, numbers, exact)


def _page_in(layout: str, published: str, source: str, tokens: int) -> Figure:
    row, alignment = LAYOUTS[layout].bytes_per_token, LAYOUTS[layout].page_alignment
    return Figure(
        f"{layout}, a page of {tokens} tokens",
        published,
        "B per page and layer",
        source,
        "tokens · bytes_per_token, rounded up to a multiple of alignment",
        {"tokens": tokens, "bytes_per_token": row, "alignment": alignment},
        Fraction(LAYOUTS[layout].bytes_per_page(tokens)),
    )


def layout_figures() -> list[Figure]:
    """Published sizes of quantised rows and pages."""
    scaled = "codes · code_bytes + scales · scale_bytes"
    mixed = f"{scaled} + plain · plain_bytes"
    split = {"codes": 512, "code_bytes": 1, "scales": 4, "scale_bytes": 4, "plain": 64, "plain_bytes": 2}
    v4 = {"codes": 448, "code_bytes": 1, "scales": 7, "scale_bytes": 1, "plain": 64, "plain_bytes": 2, "padding": 1}
    nvfp4 = "codes / 2 + scales · scale_bytes + plain · plain_bytes"
    nv = {"codes": 512, "scales": 32, "scale_bytes": 1, "plain": 64, "plain_bytes": 1}
    index = {"codes": 128, "code_bytes": 1, "scales": 1, "scale_bytes": 4}
    v4_pages = "vLLM, vllm/models/deepseek_v4/common/ops/cache_utils.py"
    indexer = "vLLM, csrc/cache_kernels.cu, indexer_k_quant_and_cache"
    return [
        _token_in(
            "fp8_ds_mla", "656", "FlashMLA (github.com/deepseek-ai/FlashMLA), README, FP8 KV cache", mixed, **split
        ),
        _token_in("deepseek_v4", "584", v4_pages, f"{mixed} + padding", **v4),
        _page_in("deepseek_v4", "37440", v4_pages, 64),
        _token_in("nvfp4_ds_mla", "352", "vLLM, csrc/nvfp4_ds_mla_cache_kernels.cu", nvfp4, **nv),
        _token_in("indexer_fp8", "132", indexer, scaled, **index),
        _page_in("indexer_fp8", "8448", indexer, 64),
    ]


def figures() -> list[Figure]:
    """The published figures."""
    v3 = latent_cache_size(MLAConfig.published("DeepSeek-V3"))
    layers = published_models()["DeepSeek-V3"].num_cached_layers
    assert layers is not None
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    heads, row = "2 · heads · head_dim · layers / 1000", "(kv_lora_rank + qk_rope_head_dim) · layers"
    small, large = (multi_head_cache_size(h, 128, 128, "MHA") for h in (16, 56))
    return [
        _kilobytes("DeepSeek-V3", "70.272", v3, layers, f"{row} · bytes_per_element / 1000", **latent),
        _grouped("Qwen-2.5-72B", "327.680", 80, 8, 128),
        _grouped("LLaMA-3.1-405B", "516.096", 126, 8, 128),
        _reduction("DeepSeek-V2, 6-bit cache", "93.3", f"{V2}, abstract; 6 bits: section 3.2.3", 6),
        _reduction(
            "DeepSeek-V2, equal precision", "82.2", "not printed: the same comparison with 16 bits on both sides", 16
        ),
        _thousands("small MoE with MHA", "110.6", small, 27, heads, heads=16, head_dim=128),
        _thousands("small MoE with MLA", "15.6", _latent(), 27, f"{row} / 1000", **latent),
        _thousands("large MoE with MHA", "860.2", large, 60, heads, heads=56, head_dim=128),
        _thousands("large MoE with MLA", "34.6", _latent(), 60, f"{row} / 1000", **latent),
        Figure(
            "groups of a GQA whose cache is as large",
            "2.25",
            "groups",
            f"{V2}, section 2.1.4",
            "(kv_lora_rank + qk_rope_head_dim) / (2 · head_dim)",
            {**latent, "head_dim": 128},
            Fraction(_latent().elements, multi_head_cache_size(1, 128, 128, "MQA").elements),
        ),
        *layout_figures(),
    ]


def cache_formulas() -> list[dict[str, Any]]:
    """Table 1 of the DeepSeek-V2 paper at that model's dimensions: each formula next to what the reference counts.

    Raises:
        CorpusError: they differ.
    """
    heads, groups, dim, layers, c, r = 128, 8, 128, 60, 512, 64
    rows: list[tuple[str, str, dict[str, int], Fraction | int, CacheSize]] = [
        (
            "MHA",
            "2 n_h d_h l",
            {"n_h": heads, "d_h": dim},
            2 * heads * dim * layers,
            multi_head_cache_size(heads, dim, dim, "MHA"),
        ),
        (
            "GQA",
            "2 n_g d_h l",
            {"n_g": groups, "d_h": dim},
            2 * groups * dim * layers,
            multi_head_cache_size(groups, dim, dim, "GQA-8"),
        ),
        ("MQA", "2 d_h l", {"d_h": dim}, 2 * dim * layers, multi_head_cache_size(1, dim, dim, "MQA")),
        ("MLA", "(d_c + d_h^R) l", {"d_c": c, "d_h^R": r}, (c + r) * layers, _latent()),
        ("MLA", "9/2 d_h l", {"d_h": dim}, Fraction(9, 2) * dim * layers, _latent()),
    ]
    records = []
    for attention, formula, numbers, value, size in rows:
        if value != size.elements * layers:
            raise CorpusError(
                f"headline_figures.json: {formula} is {value}; expected {size.elements * layers} elements per token"
            )
        records.append(
            {
                "attention": attention,
                "formula": formula,
                "numbers": {**numbers, "l": layers},
                "elements_per_token": int(value),
            }
        )
    return records


def headline_figures() -> dict[str, Any]:
    """The content of headline_figures.json."""
    return {
        "figures": [figure.record() for figure in figures()],
        "cache_formulas": {"source": f"{V2}, table 1", "rows": cache_formulas()},
    }


DOCUMENTS = {"bounds.json": bounds, "cache_sizes.json": cache_sizes, "headline_figures.json": headline_figures}


def first_difference(got: Any, want: Any, path: str = "") -> str | None:
    """Where two JSON values differ first, in words; None where they do not."""
    if isinstance(want, dict) and isinstance(got, dict):
        for key in [*want, *(k for k in got if k not in want)]:
            if key not in got or key not in want:
                return f"{path or 'the file'} {'lacks' if key in want else 'has an unexpected'} {key!r}"
            found = first_difference(got[key], want[key], f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    if isinstance(want, list) and isinstance(got, list):
        if len(got) != len(want):
            return f"{path} has {len(got)} entries; expected {len(want)}"
        differences = (first_difference(g, w, f"{path}[{i}]") for i, (g, w) in enumerate(zip(got, want, strict=True)))
        return next((found for found in differences if found), None)
    if type(got) is not type(want) or got != want:
        return f"{path or 'the file'} is {got!r}; expected {want!r}"
    return None
