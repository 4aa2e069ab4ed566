"""Cases of ``prefill``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.operations.case import Case
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True)
class PrefillInputs:
    """Arguments of ``prefill``: float64 values exactly representable in the dtype, and offsets."""

    q: Array  # [tokens, h, n+r]
    k: Array  # [key tokens, h, n+r]
    v: Array  # [key tokens, h, v]
    cu_seqlens_q: IntArray  # [b + 1]
    cu_seqlens_k: IntArray  # [b + 1]
    softmax_scale: float
    causal: bool


@dataclass(frozen=True, kw_only=True)
class PrefillCase(Case):
    """Packed sequences with their own numbers of queries and keys.

    ``logit_std`` is the standard deviation of the logits, reached through softmax_scale. ``regime``: "typical"; "outlier" has
    value channels 30 times the rest; "ties" repeats keys. Values have a mean, so that outputs do not average out to 0.
    """

    kind = "prefill"
    seqlens_q: tuple[int, ...] = (1,)
    seqlens_k: tuple[int, ...] = (1,)
    num_heads: int = 1
    qk_head_dim: int = 2
    v_head_dim: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"

    def build(self) -> PrefillInputs:
        """The inputs."""
        rng = self.generator()
        offsets_q, offsets_k = (np.cumsum([0, *n]).astype(np.int32) for n in (self.seqlens_q, self.seqlens_k))
        h, d = self.num_heads, self.qk_head_dim
        q = rng.standard_normal((offsets_q[-1], h, d))
        k = rng.standard_normal((offsets_k[-1], h, d))
        spread = np.full(self.v_head_dim, 0.5)
        if self.regime == "outlier":
            spread = np.where(rng.random(self.v_head_dim) < 0.1, 15.0, 0.5)
        v = rng.choice([-1.0, 1.0], self.v_head_dim) + spread * rng.standard_normal((len(k), h, self.v_head_dim))
        if self.regime == "ties":
            k[1::2] = k[: len(k) // 2]
        return PrefillInputs(
            q=round_to(q, self.dtype),
            k=round_to(k, self.dtype),
            v=round_to(v, self.dtype),
            cu_seqlens_q=offsets_q,
            cu_seqlens_k=offsets_k,
            softmax_scale=float(self.logit_std / np.sqrt(d)),
            causal=self.causal,
        )
