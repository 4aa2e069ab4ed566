"""One case of every operation as real calls are: several ragged sequences, several heads, lengths that end within a page.

Laws of hazards begin with it, whatever number of examples is asked for: what Hypothesis draws first is the simplest case, in
which little can go wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.dequantize_weight import WeightCase
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.operations.quantised_cache import PagesCase, QuantiseCase
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, latent_formats
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.rank_decode import RankDecodeCase
from mla_spec.operations.rope import RopeCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.operations.write_cache import WriteCase
from mla_spec.properties.strategies.counts import nearest
from mla_spec.properties.strategies.sizes import long_enough
from mla_spec.subjects.supports import Supports

LENGTHS = (5, 37, 20)


def _first(values: tuple[Any, ...] | None, default: Any) -> Any:
    return values[0] if values else default


def _page_size(supports: Supports) -> int:
    return min(supports.page_sizes or (16,), key=lambda size: abs(size - 16))


def rope(supports: Supports, profile: Profile) -> list[RopeCase]:
    """Three sequences of three tokens of three heads."""
    layout = supports.rope_layouts[0]
    return [RopeCase(dtype=profile.dtype, batch=3, s=3, heads=3, dim=16, layout=layout, start=131, stride=17)]


def decode(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Two queries to each of three sequences, where the subject takes so many."""
    c, r = _first(supports.latent_dims, (24, 8))
    return [
        DecodeCase(
            dtype=profile.dtype,
            seqlens=tuple(long_enough(n, _page_size(supports), profile) for n in LENGTHS),
            s=min(2, supports.max_s or 2),
            num_heads=_first(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=_page_size(supports),
            causal=supports.causal[0],
        )
    ]


def prefill(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Three packed sequences, with more keys than queries and with as many."""
    d, v = _first(supports.prefill_dims, (24, 16))
    return [
        PrefillCase(
            dtype=profile.dtype,
            seqlens_q=(5, 9, 2),
            seqlens_k=(20, 9, 37),
            num_heads=_first(supports.num_heads, 3),
            qk_head_dim=d,
            v_head_dim=v,
            causal=supports.causal[0],
        )
    ]


def with_options(operation: str, supports: Supports, profile: Profile) -> list[Any]:
    """The ordinary case of ``decode`` or ``prefill`` with the sink and the window that it takes; none where it takes neither."""
    case = ORDINARY[operation](supports, profile)[0]
    options: dict[str, Any] = {}
    if operation in supports.dense_sink:
        options["sink"] = "finite"
    if operation in supports.sliding_window and True in supports.causal:
        options |= {"window": 4, "causal": True}
    return [replace(case, **options)] if options else []


def ragged_decode(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """A prompt, a decoded token, a prompt after a cached prefix, and another decoded token."""
    c, r = _first(supports.latent_dims, (24, 8))
    return [
        RaggedDecodeCase(
            dtype=profile.dtype,
            seqlens_q=(9, 1, 5, 1),
            seqlens_k=tuple(long_enough(n, _page_size(supports), profile) for n in (9, 37, 20, 5)),
            num_heads=_first(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=_page_size(supports),
            causal=supports.causal[0],
        )
    ]


def rank_decode(supports: Supports, profile: Profile) -> list[RankDecodeCase]:
    """The second of three ranks, with tokens in blocks of 4: whole blocks, a part of one, and none."""
    (case,) = decode(supports, profile)
    return [
        RankDecodeCase(
            dtype=profile.dtype,
            seqlens=(*case.seqlens, 4),
            s=case.s,
            ranks=3,
            rank=1,
            interleave=nearest(supports.interleaves, 4),
            num_heads=case.num_heads,
            kv_lora_rank=case.kv_lora_rank,
            qk_rope_head_dim=case.qk_rope_head_dim,
            page_size=case.page_size,
            causal=case.causal,
        )
    ]


def merge(supports: Supports, profile: Profile) -> list[MergeCase]:
    """Parts of three sequences, some of them empty where they may be."""
    return [
        MergeCase(
            dtype=profile.dtype,
            parts=min(3, supports.max_parts or 3),
            batch=3,
            s=2,
            num_heads=_first(supports.num_heads, 3),
            head_dim_v=24,
            empty=0.0 if supports.empty_row == "unsupported" else 0.2,
        )
    ]


def write_cache(supports: Supports, profile: Profile) -> list[WriteCase]:
    """More tokens than two pages hold, some without a slot."""
    c, r = _first(supports.latent_dims, (24, 8))
    size = _page_size(supports)
    return [
        WriteCase(
            dtype=profile.dtype, tokens=2 * size + 5, kv_lora_rank=c, qk_rope_head_dim=r, page_size=size, skipped=0.2
        )
    ]


def dequantize_weight(supports: Supports, profile: Profile) -> list[WeightCase]:
    """Several blocks, the last ones smaller."""
    height, width = _first(supports.weight_block_sizes, (8, 4))
    rows, columns = 2 * height + max(1, height // 2), 2 * width + max(1, width // 2)
    return [WeightCase(dtype=profile.dtype, rows=rows, columns=columns, block_rows=height, block_columns=width)]


def quantize_cache(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    """Rows of every format, in two pages."""
    size = _page_size(supports)
    return [
        QuantiseCase(dtype=profile.dtype, format=name, page_size=size, tokens=size + 3)
        for name in supports.cache_formats[:2]
    ]


def dequantize_cache(supports: Supports, profile: Profile) -> list[PagesCase]:
    """The same of pages."""
    size = _page_size(supports)
    return [
        PagesCase(dtype=profile.dtype, format=name, page_size=size, tokens=size + 3)
        for name in supports.cache_formats[:2]
    ]


def decode_quantized(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """As ``decode``, in the first format of a latent cache."""
    return [
        QuantisedDecodeCase(
            dtype=profile.dtype,
            format=name,
            page_size=_page_size(supports),
            seqlens=LENGTHS,
            s=min(2, supports.max_s or 2),
            num_heads=_first(supports.num_heads, 3),
            causal=supports.causal[0],
            logit_std=0.1,  # what rounding dequantised rows to 16 bits leaves a meaning
            power_of_two=True,
        )
        for name in latent_formats(supports)[:1]
    ]


def _sparse(supports: Supports, profile: Profile) -> dict[str, Any]:
    c, r = _first(supports.latent_dims, (24, 8))
    return {
        "dtype": profile.dtype,
        "num_heads": _first(supports.num_heads, 3),
        "kv_lora_rank": c,
        "qk_rope_head_dim": r,
        "topk": -(-20 // supports.topk_multiple) * supports.topk_multiple,
        "invalid": 0.3,
        "with_length": supports.topk_length,
        "sink": "finite" if supports.attention_sink else "none",
    }


def sparse_prefill(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """More keys than are selected, entries that select nothing, a sink and lengths."""
    return [SparsePrefillCase(s_q=5, s_kv=70, **_sparse(supports, profile))]


def sparse_decode(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """The same of the slots of a pool."""
    size = _page_size(supports)
    s = min(2, supports.max_s or 2)
    return [SparseDecodeCase(batch=3, s=s, pages=3 + 50 // size, page_size=size, **_sparse(supports, profile))]


def project_indexer(supports: Supports, profile: Profile) -> list[ProjectIndexerCase]:
    """Three packed sequences, of which some dims are rotated."""
    h, d = _first(supports.indexer_dims, (3, 16))
    return [
        ProjectIndexerCase(
            dtype=profile.dtype,
            seqlens=(3, 7, 2),
            hidden_size=24,
            q_lora_rank=12,
            index_n_heads=h,
            index_head_dim=d,
            rope_dim=d // 4 * 2,
            layout=supports.indexer_rope_layouts[0],
            start=5,
            k_norm_eps=supports.indexer_norm_eps or 1e-6,
        )
    ]


def indexer(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Three packed sequences, two of which have more keys than are selected."""
    h, d = _first(supports.indexer_dims, (3, 16))
    return [
        IndexerCase(
            dtype=profile.dtype,
            seqlens_q=(5, 3, 2),
            seqlens_k=(37, 3, 20),
            num_heads=h,
            head_dim=d,
            top_k=_first(supports.indexer_top_k, 8),
        )
    ]


ORDINARY: dict[str, Callable[[Supports, Profile], list[Any]]] = {
    "rope": rope,
    "absorb": decode,
    "dequantize_weight": dequantize_weight,
    "prefill": prefill,
    "decode": decode,
    "ragged_decode": ragged_decode,
    "rank_decode": rank_decode,
    "merge": merge,
    "write_cache": write_cache,
    "quantize_cache": quantize_cache,
    "dequantize_cache": dequantize_cache,
    "decode_quantized": decode_quantized,
    "sparse_prefill": sparse_prefill,
    "sparse_decode": sparse_decode,
    "project_indexer": project_indexer,
    "indexer": indexer,
}
"""By the operation's name, its ordinary cases."""
