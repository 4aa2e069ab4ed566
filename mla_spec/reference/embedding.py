"""Multi-head, grouped-query and multi-query attention with rotary embedding as MLA, exactly.

An existing layer has h query heads and g key-value heads of width d, of which the first d_r are rotated:

    q_i = [R_t W_QR,i x_t ; W_QC,i x_t]      k_γ = [R_s W_KR,γ x_s ; W_KC,γ x_s]      v_γ = W_V,γ x_s

where γ = i // (h/g) is the group of head i. MLA has one rotated key for all heads. It is the concatenation of those of all
groups, and a head reads its own group's by zeros in its query:

    c_s = [W_KC,1 ; … ; W_KC,g ; W_V,1 ; … ; W_V,g] x_s            k_R = [R_s W_KR,1 x_s ; … ; R_s W_KR,g x_s]
    q_R,i = [0 ; … ; R_t W_QR,i x_t ; … ; 0]                          W_UK,i and W_UV,i select the rows of group γ

so that q_iᵀ k_γ = q_C,iᵀ W_UK,i c + q_R,iᵀ k_R. A row has g·(d + d_v) elements, as many as the layer cached before.
docs/embedding.md proves when fewer are enough, and where exactness ends. DeepSeek-V2 (arXiv 2405.04434), section 2.1.3, has
the decoupled key; TransMLA (arXiv 2502.07864) and MHA2MLA (arXiv 2502.14837) convert layers by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.reference.attention import attention
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.mla import Attend, explicit
from mla_spec.reference.product import accurate_product
from mla_spec.reference.rope import apply_rope, split_pairs
from mla_spec.reference.scaling import require_positive_int
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True, kw_only=True)
class GroupedAttention:
    """Dimensions of a layer with MHA (g = h), GQA or MQA (g = 1).

    Args:
        hidden_size: e.
        num_heads: h.
        num_key_value_heads: g, which divides h; heads of a group are consecutive.
        head_dim: d, width of a query and a key.
        v_head_dim: d_v.
        rope: rotary embedding of the first ``rope.dim`` of the d dims, or None.

    Raises:
        ValueError: a dimension is not a positive integer, g does not divide h, or rope.dim exceeds head_dim.
    """

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    rope: RopeConfig | None = None

    def __post_init__(self) -> None:
        dims = ("hidden_size", "num_heads", "num_key_value_heads", "head_dim", "v_head_dim")
        require_positive_int("GroupedAttention", **{name: getattr(self, name) for name in dims})
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                "GroupedAttention: num_key_value_heads must divide num_heads, "
                f"got {self.num_key_value_heads} and {self.num_heads}"
            )
        if self.rope_dim > self.head_dim:
            raise ValueError(
                f"GroupedAttention: rope.dim must not exceed head_dim, got {self.rope_dim} and {self.head_dim}"
            )

    @property
    def rope_dim(self) -> int:
        """d_r: how many leading dims of a head are rotated."""
        return 0 if self.rope is None else self.rope.dim

    @property
    def group_of(self) -> IntArray:
        """The key-value head of each query head, [h]."""
        return np.arange(self.num_heads) // (self.num_heads // self.num_key_value_heads)

    @property
    def kv_lora_rank(self) -> int:
        """c of the embedding: g·(d − d_r + d_v)."""
        return self.num_key_value_heads * (self.head_dim - self.rope_dim + self.v_head_dim)

    @property
    def qk_nope_head_dim(self) -> int:
        """n of the embedding: d − d_r."""
        return self.head_dim - self.rope_dim

    @property
    def qk_rope_head_dim(self) -> int:
        """r of the embedding: g·d_r."""
        return self.num_key_value_heads * self.rope_dim

    @property
    def kind(self) -> str:
        """The usual name: "MHA", "GQA" or "MQA"."""
        if self.num_key_value_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_key_value_heads == 1 else "GQA"

    @property
    def softmax_scale(self) -> float:
        """d^-1/2. It is not (n + r)^-1/2, since most of the r dims of a query are 0."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class GroupedWeights:
    """Weights of a layer, each [out, in]: q_proj [h·d, e], k_proj [g·d, e], v_proj [g·d_v, e], o_proj [e, h·d_v]."""

    q_proj: Array
    k_proj: Array
    v_proj: Array
    o_proj: Array

    def require_shapes(self, dims: GroupedAttention) -> None:
        """Raise ValueError unless the shapes are those of ``dims``."""
        e, h, g, d, dv = dims.hidden_size, dims.num_heads, dims.num_key_value_heads, dims.head_dim, dims.v_head_dim
        shapes = {"q_proj": (h * d, e), "k_proj": (g * d, e), "v_proj": (g * dv, e), "o_proj": (e, h * dv)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"weights: {name} must have shape {shape}, got {getattr(self, name).shape}")


@dataclass(frozen=True)
class EmbeddedWeights:
    """The same layer in MLA's names, without norms on latents.

    Attributes:
        q_proj: [h·(n + r), e].
        kv_a_proj_with_mqa: [c + r, e].
        kv_b_proj: [h·(n + d_v), c]; each row selects an element of the latent.
        o_proj: [e, h·d_v].
    """

    q_proj: Array
    kv_a_proj_with_mqa: Array
    kv_b_proj: Array
    o_proj: Array


def embed(weights: GroupedWeights, dims: GroupedAttention) -> EmbeddedWeights:
    """The weights of ``dims``'s layer as those of MLA; every number is one of theirs, 0 or 1.

    Raises:
        ValueError: weights of other shapes.
    """
    weights.require_shapes(dims)
    e, h, g, rope, group = dims.hidden_size, dims.num_heads, dims.num_key_value_heads, dims.rope_dim, dims.group_of
    q = weights.q_proj.reshape(h, dims.head_dim, e)
    k = weights.k_proj.reshape(g, dims.head_dim, e)
    blocks = np.zeros((h, g, rope, e))
    blocks[np.arange(h), group] = q[:, :rope]
    q_pe = blocks.reshape(h, g * rope, e)  # [h, r, e]
    latent = [k[:, rope:].reshape(-1, e), weights.v_proj]  # [g·n, e], [g·d_v, e]
    k_pe = k[:, :rope].reshape(-1, e)  # [r, e]
    nope, v, c = dims.qk_nope_head_dim, dims.v_head_dim, dims.kv_lora_rank
    identity = np.eye(c)
    w_uk = identity[: g * nope].reshape(g, nope, c)[group]  # [h, n, c]
    w_uv = identity[g * nope :].reshape(g, v, c)[group]  # [h, d_v, c]
    return EmbeddedWeights(
        q_proj=np.concatenate([q[:, rope:], q_pe], axis=1).reshape(-1, e),
        kv_a_proj_with_mqa=np.concatenate([*latent, k_pe]),
        kv_b_proj=np.concatenate([w_uk, w_uv], axis=1).reshape(-1, c),
        o_proj=weights.o_proj,
    )


def grouped_layer(hidden: Array, positions: IntArray, weights: GroupedWeights, dims: GroupedAttention) -> Array:
    """The existing layer, causal: hidden [..., s, e] at positions [..., s] to [..., s, e]."""
    weights.require_shapes(dims)
    lead, g = hidden.shape[:-1], dims.num_key_value_heads
    q = accurate_product(hidden, weights.q_proj.T).reshape(*lead, dims.num_heads, -1)  # [..., s, h, d]
    k = accurate_product(hidden, weights.k_proj.T).reshape(*lead, g, -1)  # [..., s, g, d]
    v = accurate_product(hidden, weights.v_proj.T).reshape(*lead, g, -1)  # [..., s, g, d_v]
    q, k = (_rotated(x, positions, dims) for x in (q, k))
    out, _ = attention(q, k, v, softmax_scale=dims.softmax_scale)
    return accurate_product(out.reshape(*lead, -1), weights.o_proj.T)


def embedded_layer(
    hidden: Array, positions: IntArray, weights: EmbeddedWeights, dims: GroupedAttention, attend: Attend = explicit
) -> Array:
    """The embedding of the layer, by ``explicit`` or ``absorbed`` MLA: equal to ``grouped_layer`` in exact arithmetic."""
    lead, h, g, nope = hidden.shape[:-1], dims.num_heads, dims.num_key_value_heads, dims.qk_nope_head_dim
    q = accurate_product(hidden, weights.q_proj.T).reshape(*lead, h, nope + dims.qk_rope_head_dim)
    rows = accurate_product(hidden, weights.kv_a_proj_with_mqa.T)  # [..., s, c+r]
    latent, k_pe = rows[..., : dims.kv_lora_rank], rows[..., dims.kv_lora_rank :]
    blocks = (*lead, h * g, dims.rope_dim), (*lead, g, dims.rope_dim)  # each rotated alike
    q_pe = _rotated(q[..., nope:].reshape(blocks[0]), positions, dims).reshape(*lead, h, dims.qk_rope_head_dim)
    k_pe = _rotated(k_pe.reshape(blocks[1]), positions, dims).reshape(*lead, dims.qk_rope_head_dim)
    w_uk, w_uv = _factors(weights.kv_b_proj, dims)
    out, _ = attend(q[..., :nope], q_pe, latent, k_pe, w_uk, w_uv, softmax_scale=dims.softmax_scale)
    return accurate_product(out.reshape(*lead, -1), weights.o_proj.T)


def exact_row(weights: GroupedWeights, dims: GroupedAttention) -> tuple[int, int]:
    """(c, r): widths that are enough for an exact embedding of these weights, whose frequencies may be repeated.

    c is the rank of [W_KC; W_V]. r is twice the sum over frequencies of the rank of the g complex rows that the pairs of
    W_KR of that frequency are: a rotation is a product with e^{iθ}, which commutes with every complex mixture of the groups
    (TransMLA, section 4, mixes them by a real one). docs/embedding.md has the proof. Ranks are numerical.
    """
    weights.require_shapes(dims)
    k = weights.k_proj.reshape(dims.num_key_value_heads, dims.head_dim, -1)  # [g, d, e]
    latent = np.concatenate([k[:, dims.rope_dim :].reshape(-1, dims.hidden_size), weights.v_proj])
    pairs = 0
    if dims.rope is not None:
        real, imaginary = split_pairs(np.swapaxes(k[:, : dims.rope_dim], 1, 2), dims.rope.interleaved)  # [g, e, d_r/2]
        complex_rows = np.moveaxis(real + 1j * imaginary, 2, 0)  # [d_r/2, g, e]
        pairs = int(np.linalg.matrix_rank(complex_rows).sum())
    return int(np.linalg.matrix_rank(latent)), 2 * pairs


def _factors(kv_b_proj: Array, dims: GroupedAttention) -> tuple[Array, Array]:
    """(w_uk [h, n, c], w_uv [h, d_v, c]); n may be 0, which ``absorb``'s configuration excludes."""
    per_head = kv_b_proj.reshape(dims.num_heads, dims.qk_nope_head_dim + dims.v_head_dim, dims.kv_lora_rank)
    return per_head[:, : dims.qk_nope_head_dim], per_head[:, dims.qk_nope_head_dim :]


def _rotated(x: Array, positions: IntArray, dims: GroupedAttention) -> Array:
    """X [..., s, heads, at least d_r] with the first d_r dims of each head rotated."""
    if dims.rope is None:
        return x
    rotated = apply_rope(x[..., : dims.rope_dim], positions, dims.rope)
    return np.concatenate([rotated, x[..., dims.rope_dim :]], axis=-1)
