"""Tensor parallelism: the heads of a layer divided among ranks, each of which is a layer of its own.

Rank i has heads i·h/ranks .. (i + 1)·h/ranks - 1 (Megatron-LM, arXiv 1909.08053, section 3): the rows of the up-projections
and the columns of o_proj that are theirs. The down-projections and the norms are whole on every rank, and so is the latent
cache. The layer's output is the sum of what the ranks give, which an all-reduce forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import Weights, check_weights
from mla_spec.reference.typing import Array

HEAD_AXES = {"q_proj": 0, "q_b_proj": 0, "q_gate_proj": 0, "kv_b_proj": 0, "o_proj": 1, "g_proj": 0, "sinks": 0}
"""The axis of each weight [out, in] along which its heads lie; the others have none."""


def shard_config(config: MLAConfig, ranks: int) -> MLAConfig:
    """The configuration of one rank's layer.

    Raises:
        ValueError: the number of heads is no multiple of ``ranks``.
    """
    if ranks < 1 or config.num_heads % ranks:
        raise ValueError(f"shard_config: {config.num_heads} heads cannot be divided among {ranks} ranks")
    return replace(config, num_heads=config.num_heads // ranks)


def shard_layer(weights: Weights, config: MLAConfig, ranks: int) -> list[tuple[dict[str, Array], MLAConfig]]:
    """(weights, configuration) of each rank's layer.

    Raises:
        ValueError: weights do not fit the configuration, or the number of heads is no multiple of ``ranks``.
    """
    check_weights(weights, config)
    own = shard_config(config, ranks)
    parts = {
        name: np.split(w, ranks, axis=HEAD_AXES[name]) if name in HEAD_AXES else [w] * ranks
        for name, w in weights.items()
    }
    return [({name: split[rank] for name, split in parts.items()}, own) for rank in range(ranks)]


def gather_gradients(gradients: Sequence[Weights]) -> dict[str, Array]:
    """Gradients of the whole layer's weights, from those of each rank's weights, by name.

    Every rank uses the latents, k_pe and the norms for its own heads, so that the gradients of what is whole on every rank
    add up: all rows of kv_a_proj_with_mqa among them, the latent ones and the rope ones.
    """
    return {
        name: np.concatenate(parts, axis=HEAD_AXES[name]) if name in HEAD_AXES else np.sum(parts, axis=0)
        for name, parts in ((name, [g[name] for g in gradients]) for name in gradients[0])
    }
