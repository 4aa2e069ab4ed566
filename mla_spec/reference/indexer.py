"""The lightning indexer inside a layer: its operands from hidden states, with its own projections, norm and rotation.

DeepSeek-V3.2 (technical report, section 2.1; inference/model.py, class Indexer) and GLM-5 (transformers,
models/glm_moe_dsa). What the indexer then does with the operands is in ``mla_spec.reference.sparse``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.reference.config import RopeConfig
from mla_spec.reference.mla import Weights
from mla_spec.reference.product import accurate_product
from mla_spec.reference.published import PublishedModel, published_model
from mla_spec.reference.rope import apply_rope
from mla_spec.reference.scaling import require_positive, require_positive_int
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Dimensions of the indexer of one layer, in the names of the published configurations.

    Args:
        hidden_size: e, width of the residual stream.
        q_lora_rank: width of the query latent, from which the queries are projected.
        index_n_heads: h.
        index_head_dim: d, width of the queries and of the one key of a token.
        index_topk: keys that a query selects.
        rope: rotary embedding of the first ``rope.dim`` of the d dims, or None. Its layout is the indexer's own: half in
            DeepSeek-V3.2, whose attention is interleaved; interleaved in GLM-5.
        k_norm_eps: eps of the LayerNorm on the keys.

    Raises:
        ValueError: a dimension is not a positive integer, or rope.dim exceeds index_head_dim.
    """

    hidden_size: int
    q_lora_rank: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rope: RopeConfig | None = None
    k_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_positive_int(
            "IndexerConfig",
            hidden_size=self.hidden_size,
            q_lora_rank=self.q_lora_rank,
            index_n_heads=self.index_n_heads,
            index_head_dim=self.index_head_dim,
            index_topk=self.index_topk,
        )
        if self.rope_dim > self.index_head_dim:
            raise ValueError(
                f"IndexerConfig: rope.dim must not exceed index_head_dim, got {self.rope_dim} and {self.index_head_dim}"
            )
        require_positive("IndexerConfig", k_norm_eps=self.k_norm_eps)

    @property
    def rope_dim(self) -> int:
        """How many leading dims are rotated."""
        return 0 if self.rope is None else self.rope.dim

    @property
    def weight_scale(self) -> float:
        """The factor on the weights of the heads: h^-1/2, and the scale d^-1/2 of q·k, which relu lets through."""
        return 1.0 / math.sqrt(self.index_n_heads * self.index_head_dim)

    @classmethod
    def published(cls, name: str) -> IndexerConfig:
        """The indexer of a published model, e.g. ``IndexerConfig.published("GLM-5")``.

        Raises:
            ValueError: the model is unknown, has no indexer, or has one with an option that this class cannot express.
        """
        return _of_model(published_model(name))


def _of_model(model: PublishedModel) -> IndexerConfig:
    fields = model.fields
    if not fields.get("num_indexer_layers"):
        raise ValueError(f"{model.name}: has no indexer")
    layout = fields.get("indexer_rope")
    if layout is None or "FIRST" not in layout:
        raise ValueError(
            f"{model.name}: which dims its indexer rotates, and how, is not published or not the first ones"
        )
    rope = model.mla_config().rope
    dims = ("hidden_size", "q_lora_rank", "index_n_heads", "index_head_dim", "index_topk")
    return IndexerConfig(
        **{name: fields[name] for name in dims},
        rope=None if rope is None else replace(rope, interleaved=layout.startswith("interleaved")),
    )


def indexer_weight_shapes(config: IndexerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an indexer's weights, as in published checkpoints; ``wq_b`` is viewed as (h, d, q_lora_rank)."""
    h, d, e = config.index_n_heads, config.index_head_dim, config.hidden_size
    return {
        "wq_b": (h * d, config.q_lora_rank),
        "wk": (d, e),
        "k_norm.weight": (d,),
        "k_norm.bias": (d,),
        "weights_proj": (h, e),
    }


def check_indexer_weights(weights: Weights, config: IndexerConfig) -> None:
    """Raise ValueError unless ``weights`` has exactly the names and shapes of ``indexer_weight_shapes``."""
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    if shapes != indexer_weight_shapes(config):
        raise ValueError(f"weights of an indexer must have shapes {indexer_weight_shapes(config)}, got {shapes}")


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Weight · (x − mean) / sqrt(variance + eps) + bias over the last axis (Layer Normalization, arXiv 1607.06450)."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    normalised: Array = weight * centred / deviation + bias
    return normalised


def project_indexer(
    hidden: Array, q_latent: Array, positions: IntArray, weights: Weights, config: IndexerConfig
) -> tuple[Array, Array, Array]:
    """The operands of ``indexer_logits``: q = RoPE(W_qb c_Q), k = RoPE(LayerNorm(W_k x)), w = W_w x · (h d)^-1/2.

    Rotation turns the first dims of q and k. DeepSeek-V3.2 then multiplies both by one orthogonal (Hadamard) matrix, lest
    few elements dominate their FP8 codes; no q·k depends on it, and it is left out here.

    Args:
        hidden: [..., s, e].
        q_latent: [..., s, q_lora_rank], the attention's query latent after its norm.
        positions: [..., s].

    Returns:
        (q [..., s, h, d], k [..., s, d], weights [..., s, h]).

    Raises:
        ValueError: weights do not fit the configuration.
    """
    check_indexer_weights(weights, config)
    q = accurate_product(q_latent, weights["wq_b"].T)  # [..., s, h·d]
    q = q.reshape(*q_latent.shape[:-1], config.index_n_heads, config.index_head_dim)  # [..., s, h, d]
    k = accurate_product(hidden, weights["wk"].T)  # [..., s, d]
    k = layer_norm(k, weights["k_norm.weight"], weights["k_norm.bias"], config.k_norm_eps)
    w = config.weight_scale * accurate_product(hidden, weights["weights_proj"].T)  # [..., s, h]
    return _rotated(q, positions, config.rope), _rotated(k, positions, config.rope), w


def _rotated(x: Array, positions: IntArray, rope: RopeConfig | None) -> Array:
    if rope is None:
        return x
    return np.concatenate([apply_rope(x[..., : rope.dim], positions, rope), x[..., rope.dim :]], axis=-1)
