"""Cases of ``project_indexer``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.operations.case import Case
from mla_spec.operations.rope import make_rope
from mla_spec.reference.formats import round_to
from mla_spec.reference.indexer import IndexerConfig, indexer_weight_shapes
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True)
class ProjectIndexerInputs:
    """Arguments of ``project_indexer``; values exactly representable in the dtype."""

    hidden: Array  # [tokens, e]
    q_latent: Array  # [tokens, q_lora_rank]
    positions: IntArray  # [tokens]
    weights: dict[str, Array]
    config: IndexerConfig


@dataclass(frozen=True, kw_only=True)
class ProjectIndexerCase(Case):
    """Tokens of packed sequences at positions that run from ``start``, and begin anew in each sequence.

    ``rope_dim`` 0 leaves all dims unrotated. ``hidden_scale`` scales the hidden states: small ones make the eps of the
    LayerNorm visible.
    """

    kind = "project_indexer"
    seqlens: tuple[int, ...] = (1,)
    hidden_size: int = 8
    q_lora_rank: int = 4
    index_n_heads: int = 1
    index_head_dim: int = 8
    rope_dim: int = 4
    layout: str = "half"
    theta: float = 10000.0
    yarn: str = "none"
    longrope: str = "none"
    start: int = 0
    k_norm_eps: float = 1e-6
    hidden_scale: float = 1.0

    @property
    def config(self) -> IndexerConfig:
        return IndexerConfig(
            hidden_size=self.hidden_size,
            q_lora_rank=self.q_lora_rank,
            index_n_heads=self.index_n_heads,
            index_head_dim=self.index_head_dim,
            index_topk=1,  # of no consequence for the operands
            rope=make_rope(
                dim=self.rope_dim, layout=self.layout, theta=self.theta, yarn=self.yarn, longrope=self.longrope
            ),
            k_norm_eps=self.k_norm_eps,
        )

    def build(self) -> ProjectIndexerInputs:
        """The inputs."""
        rng, config = self.generator(), self.config
        tokens = sum(self.seqlens)
        weights = {}
        for name, shape in indexer_weight_shapes(config).items():
            values = rng.standard_normal(shape)
            if name == "k_norm.weight":
                values = 1 + 0.25 * values
            weights[name] = round_to(values / np.sqrt(shape[-1]) if len(shape) == 2 else values, self.dtype)
        hidden = self.hidden_scale * rng.standard_normal((tokens, self.hidden_size))
        return ProjectIndexerInputs(
            hidden=round_to(hidden, self.dtype),
            q_latent=round_to(rng.standard_normal((tokens, self.q_lora_rank)), self.dtype),
            positions=np.concatenate([self.start + np.arange(n) for n in self.seqlens]),
            weights=weights,
            config=config,
        )
