"""What a subject is: operations it may offer, and what it declares about itself.

A subject is any object with some of the methods below. It gets and returns torch tensors on its own device. ``name``,
``profile`` and ``supports`` are optional attributes; an absent method means the operation is not offered.

=============  =====================================================================  ==============================
operation      call                                                                   returns
=============  =====================================================================  ==============================
``rope``       ``rope(x, positions, *, rope)``                                        x rotated, same shape
``absorb``     ``absorb(kv_b_proj, *, config)``                                       (w_uk [h,n,c], w_uv [h,v,c])
``decode``     ``decode(q, kv_cache, block_table, cache_seqlens, *,                   (out [b,s,h,c],
               head_dim_v, softmax_scale, causal)``                                   lse [b,h,s] or None)
``layer``      ``layer(weights, config)``                                             an object with ``prefill``,
                                                                                      ``decode``, ``reset`` and
                                                                                      ``cache_bytes``
=============  =====================================================================  ==============================

Shapes: x is positions.shape + (r,) or positions.shape + (h, r); kv_b_proj [h·(n+v), c], viewed as (h, n + v, c);
q [b, s, h, c + r]; kv_cache [pages, page_size, 1, c + r], latent first; block_table int32 [b, max pages]; cache_seqlens
int32 [b], counting the s new tokens; positions int64. ``rope`` is a RopeConfig and ``config`` an MLAConfig.

decode: query i of s sees keys 0 .. seqlen - s + i when causal, all keys otherwise. The LSE is the natural logarithm, in
float32 or better. Whatever lies beyond a sequence's length, in pages or in table entries, may hold anything.

layer: ``prefill(hidden, positions)`` and ``decode(hidden, positions)`` take hidden [b, s, e] and positions [b, s], append
to the layer's own cache and return [b, s, e]; ``reset()`` empties the cache; ``cache_bytes()`` is what its rows occupy.
Weights have their checkpoint names and shapes (``mla_spec.reference.mla.weight_shapes``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from mla_spec.reference.formats import FORMATS
from mla_spec.reference.profile import Profile

OPERATIONS = ("rope", "absorb", "decode", "layer")
DTYPES = tuple(FORMATS)


@dataclass(frozen=True, kw_only=True)
class Supports:
    """What a subject can be given. The default is everything; declaring less shows in its report as covering less.

    Args:
        dtypes: of the tensors.
        page_sizes: of the cache, in tokens; None for any.
        num_heads: None for any.
        latent_dims: pairs (kv_lora_rank, qk_rope_head_dim) of ``decode``; None for any.
        max_s: most queries per sequence in ``decode``; None for any.
        lse: whether ``decode`` returns the LSE.
        causal: the values of ``causal`` that ``decode`` accepts.
        empty_row: what a row without keys gives, as "out/lse"; "unsupported" where such rows may not occur.
        rope_layouts: pair layouts, of "interleaved" and "half".
        rope_optional: whether a layer may have no rotary embedding (NoPE).
        yarn: whether YaRN is implemented.
        yarn_mscale_rule: whether only "equal" mscale and mscale_all_dim are implemented, or "any".
        layer_dim_multiple: kv_lora_rank and qk_nope_head_dim of a layer must be multiples of it.
        latent_norm_eps: the only eps of the latent norms, or None for any.
        cache_page: tokens to which a layer's cache is rounded up.

    Raises:
        ValueError: an unknown dtype, empty-row rule or rope layout.
    """

    dtypes: tuple[str, ...] = DTYPES
    page_sizes: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None
    latent_dims: tuple[tuple[int, int], ...] | None = None
    max_s: int | None = None
    lse: bool = True
    causal: tuple[bool, ...] = (True, False)
    empty_row: Literal["zero/-inf", "zero/+inf", "unsupported"] = "zero/-inf"
    rope_layouts: tuple[str, ...] = ("interleaved", "half")
    rope_optional: bool = True
    yarn: bool = True
    yarn_mscale_rule: Literal["any", "equal"] = "any"
    layer_dim_multiple: int = 1
    latent_norm_eps: float | None = None
    cache_page: int = 1

    def __post_init__(self) -> None:
        _require_known("dtypes", self.dtypes, DTYPES)
        _require_known("rope_layouts", self.rope_layouts, ("interleaved", "half"))
        _require_known("empty_row", (self.empty_row,), ("zero/-inf", "zero/+inf", "unsupported"))
        _require_known("yarn_mscale_rule", (self.yarn_mscale_rule,), ("any", "equal"))

    def restrictions(self) -> str:
        """The fields that differ from the default, in one line; empty when nothing is restricted."""
        default = Supports()
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)


def _require_known(field: str, values: tuple[Any, ...], known: tuple[Any, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"Supports: {field} has unknown value {value!r}; known are {', '.join(known)}")


def subject_name(subject: object) -> str:
    """``subject.name``, else the name of its class."""
    return str(getattr(subject, "name", type(subject).__name__))


def offers(subject: object, operation: str) -> bool:
    """Whether the subject has the method ``operation``."""
    return callable(getattr(subject, operation, None))


def supports_of(subject: object) -> Supports:
    """``subject.supports``, else everything; TypeError when it is something else."""
    supports = getattr(subject, "supports", None)
    if supports is None:
        return Supports()
    if not isinstance(supports, Supports):
        raise TypeError(f"{subject_name(subject)}.supports must be a Supports, got {type(supports).__name__}")
    return supports


def profile_of(subject: object, dtype: str) -> Profile:
    """The profile declared for ``dtype`` in the mapping ``subject.profile``, else the default of that dtype.

    Raises:
        TypeError: ``subject.profile`` is no mapping from dtype names to Profiles of that dtype.
    """
    declared = getattr(subject, "profile", None)
    if declared is None:
        return Profile.default(dtype)
    name = subject_name(subject)
    if not isinstance(declared, Mapping):
        raise TypeError(f"{name}.profile must map dtype names to Profiles, got {type(declared).__name__}")
    profile = declared.get(dtype)
    if profile is None:
        return Profile.default(dtype)
    if not isinstance(profile, Profile) or profile.dtype != dtype:
        raise TypeError(f"{name}.profile[{dtype!r}] must be a Profile of dtype {dtype!r}, got {profile!r}")
    return profile


def require_subject(subject: object) -> None:
    """Raise TypeError, in one sentence, unless ``subject`` offers an operation and declares itself consistently."""
    if not any(offers(subject, operation) for operation in OPERATIONS):
        raise TypeError(f"{subject_name(subject)} is not a subject: it has none of the methods {', '.join(OPERATIONS)}")
    for dtype in supports_of(subject).dtypes:
        profile_of(subject, dtype)
