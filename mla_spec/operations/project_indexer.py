"""``project_indexer``: the operands of the lightning indexer, from a layer's hidden states.

hidden is [tokens, e]. q_latent [tokens, q_lora_rank] is the attention's query latent after its norm. positions are int64
[tokens]. weights have their checkpoint names and shapes, and ``config`` is an ``IndexerConfig``
(``mla_spec.reference.indexer``).

Returned are q [tokens, h, d] and k [tokens, d] in the dtype, and weights [tokens, h] in float32 (float64 for float64
tensors), as ``indexer`` takes them, with the factor (h d)^-1/2 in them. The first ``config.rope.dim`` dims of q and k are
rotated, in the layout that ``config.rope`` states, and returned in it; the others are not. A Hadamard matrix on q and k, on
which no q·k depends, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mla_spec.bounds.profile import Profile
from mla_spec.bounds.project_indexer import project_indexer_with_bound
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Answers, Operation, Within
from mla_spec.operations.rope import REGIMES as ROTARY
from mla_spec.operations.rope import make_rope
from mla_spec.reference.formats import round_to
from mla_spec.reference.indexer import IndexerConfig, indexer_weight_shapes
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Tensors
from mla_spec.subjects.near import near
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import every_other, transposed, viewed


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


def expected(inputs: ProjectIndexerInputs, profile: Profile, supports: Supports) -> Answers:
    """All three operands, with their bounds."""
    want = project_indexer_with_bound(**vars(inputs), profile=profile)
    return (
        Within(want.q, want.q_error),
        Within(want.k, want.k_error),
        Within(want.weights, want.weights_error),
    )


@near
def _one_fused_projection(t: Tensors) -> Tensors:
    """hidden and q_latent as slices of one row, as a fused projection may write them."""
    both = torch.cat([t["hidden"], t["q_latent"]], dim=-1)
    e = t["hidden"].shape[-1]
    return t | {"hidden": both[:, :e], "q_latent": both[:, e:]}


def _weights_stored_in_out(t: Tensors) -> Tensors:
    return t | {name: transposed(w, 0, 1) for name, w in t.items() if name.startswith("weights.") and w.ndim == 2}


def _weights_as_every_other(t: Tensors) -> Tensors:
    return t | {name: every_other(w) for name, w in t.items() if name.startswith("weights.") and w.ndim == 1}


OPERATION = Operation(
    name="project_indexer",
    sizes=("indexer_dims",),
    contract=__doc__,
    case=ProjectIndexerCase,
    arguments=(
        Argument("hidden", "[tokens, e]", far=True),
        Argument("q_latent", "[tokens, q_lora_rank]", far=True),
        Argument("positions", "[tokens]", "int64"),
        Argument("weights", "{name: tensor}"),
        Argument("config", kind="config"),
    ),
    outputs=(
        Output("q", "[tokens, h, d]", lambda i: (len(i.hidden), i.config.index_n_heads, i.config.index_head_dim)),
        Output("k", "[tokens, d]", lambda i: (len(i.hidden), i.config.index_head_dim)),
        Output("weights", "[tokens, h]", lambda i: (len(i.hidden), i.config.index_n_heads), "wide"),
    ),
    expected=expected,
    views={
        "hidden and q_latent as slices of one row": _one_fused_projection,
        "positions as every other element": viewed(every_other, "positions"),
        "weights stored [in, out]": _weights_stored_in_out,
        "vectors of weights as every other element": _weights_as_every_other,
    },
    regimes=(
        *ROTARY,
        ("no rotary embedding", lambda case: case.rope_dim == 0),
        ("small hidden states", lambda case: case.hidden_scale < 1),
    ),
    others=lambda case: (
        replace(case, seed=case.seed + 1, start=case.start + 17).build(),
        replace(case, seed=case.seed + 2, seqlens=case.seqlens[::-1]).build(),
        replace(case, seed=case.seed + 3, theta=case.theta / 2).build(),
    ),
    distant=lambda case: replace(case, seqlens=(3,)).build(),
)
