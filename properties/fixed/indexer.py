"""Fixed cases of ``indexer``."""

from __future__ import annotations

from dataclasses import replace

from mla_spec.bounds.profile import Profile
from mla_spec.operations.indexer import IndexerCase
from mla_spec.properties.fixed.counts import FEW, first_of, nearest
from mla_spec.properties.strategies.sizes import cycled
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Three packed sequences, two of which have more keys than are selected."""
    h, d = first_of(supports.indexer_dims, (3, 16))
    return [
        IndexerCase(
            dtype=profile.dtype,
            seqlens_q=(5, 3, 2),
            seqlens_k=(37, 3, 20),
            num_heads=h,
            head_dim=d,
            top_k=first_of(supports.indexer_top_k, 8),
        )
    ]


def elementary(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Fewer keys than are selected, more, and equal logits."""
    (base,) = ordinary(supports, profile)
    return [replace(base, seqlens_q=(1,), seqlens_k=(1,)), replace(base, regime="ties"), base]


def _case(
    supports: Supports,
    profile: Profile,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dims: tuple[int, int],
    most: int,
    regime: str = "typical",
) -> IndexerCase:
    """Of ``dims`` heads and elements of each, with the nearest number of selected keys that the subject takes."""
    return IndexerCase(
        dtype=profile.dtype,
        seqlens_q=queries,
        seqlens_k=keys,
        num_heads=dims[0],
        head_dim=dims[1],
        top_k=nearest(supports.indexer_top_k, most),
        regime=regime,
    )


def counts(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Many heads; 2048 of more keys, 1500 of which tie with others; more equal keys than 16 bits count."""
    least, most = min(supports.indexer_dims or ((3, 8),)), max(supports.indexer_dims or ((64, 16),))
    # three keys in five are equal, and some but not all of them are selected: what "integers" has in few dims
    equal = (1, 2) if supports.indexer_dims is None else least
    many = tuple(cycled([1, 2, 0, 1, 1], 140)), tuple(cycled(list(FEW), 140))
    return [
        _case(supports, profile, (2, 3), (2500, 4161), least, 2048),
        _case(supports, profile, (1, 2), (8300, 65_700), least, 2048),
        _case(supports, profile, (2, 1), (5000, 9), equal, 2048, "integers"),
        _case(supports, profile, (1, 1), (98_700, 9), equal, 2048, "integers"),
        _case(supports, profile, (3, 2), (70, 37), most, 20),
        _case(supports, profile, *many, least, 8),
        _case(supports, profile, (4, 1), (2050, 2049), least, 2048),  # one key more than are selected, and one less
        _case(supports, profile, (2, 1), (3000, 2100), least, 2048, "negative"),
        _case(supports, profile, (2100,), (300,), min(supports.indexer_dims or ((1, 4),)), 64),
    ]


def crossed(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Chunks of queries and many heads over thousands of keys, many sequences of hundreds, and DeepSeek-V3.2's shape."""
    least, most = min(supports.indexer_dims or ((3, 8),)), max(supports.indexer_dims or ((64, 8),))
    return [
        _case(supports, profile, (130, 1, 64), (1500, 300, 1100), least, 512),
        _case(supports, profile, (3, 2), (1100, 700), most, 512),
        _case(supports, profile, (1,) * 12, tuple(range(100, 460, 30)), least, 64),
        *(
            [_case(supports, profile, (1,), (2100,), (64, 128), 2048)]
            if (64, 128) in (supports.indexer_dims or ((64, 128),))
            else []
        ),
    ]
