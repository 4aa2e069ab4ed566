"""Cases of ``decode``, which laws of absorption use as well."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.operations.case import Case
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array, IntArray

CANCELLATION = 16.0
"""By how much the products of a score are larger than the score in the regime "cancelling"."""


@dataclass(frozen=True)
class DecodeInputs:
    """Arguments of ``decode``: float64 values exactly representable in the dtype, and integer tables."""

    q: Array  # [b, s, h, c+r]
    kv_cache: Array  # [pages, page_size, 1, c+r]
    block_table: IntArray  # [b, max pages]
    cache_seqlens: IntArray  # [b]
    head_dim_v: int
    softmax_scale: float
    causal: bool


@dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """Queries against a paged latent cache.

    ``logit_std`` is the standard deviation of the logits, reached through softmax_scale. ``regime``: "typical"; "outlier"
    has latent channels 30 times the rest; "ties" repeats keys; "offset" has values far from 0; "sink" gives the first key
    much of the weight; in "cancelling" scores are small sums of large products. Latents have a mean, as real ones do, so
    outputs do not average out to 0. ``qk_nope_head_dim`` and ``v_head_dim`` are those of the explicit form.
    """

    kind = "decode"
    seqlens: tuple[int, ...] = (1,)
    s: int = 1
    num_heads: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    page_size: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"
    qk_nope_head_dim: int = 2
    v_head_dim: int = 3

    @property
    def pages_needed(self) -> list[int]:
        return [-(-n // self.page_size) for n in self.seqlens]

    def build(self) -> DecodeInputs:
        """The inputs: pages in random order in a pool with spare pages, unused slots and entries harmless."""
        rng = self.generator()
        b, h, c, d = len(self.seqlens), self.num_heads, self.kv_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim
        width = max(self.pages_needed) + 2
        pool = sum(self.pages_needed) + 3
        table = rng.integers(0, pool, (b, width)).astype(np.int32)
        order = iter(rng.permutation(pool))
        for row, count in zip(table, self.pages_needed, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        cache = self._rows(rng, (pool, self.page_size, 1), c, d)
        q = rng.standard_normal((b, self.s, h, d))
        scale = self.logit_std / np.sqrt(c / 4 + self.qk_rope_head_dim)
        if self.regime == "cancelling":
            q[..., 1:c:2] = q[..., 0 : c - 1 : 2]
            q[..., c:] /= CANCELLATION
            scale *= CANCELLATION
        if self.regime == "sink":
            for i in range(b):
                cache[table[i, 0], 0, 0] = np.abs(cache[table[i, 0], 0, 0]) * np.sign(q[i].sum(axis=(0, 1)))
        q, cache = round_to(q, self.dtype), round_to(cache, self.dtype)
        return DecodeInputs(
            q=q,
            kv_cache=cache,
            block_table=table,
            cache_seqlens=np.array(self.seqlens, dtype=np.int32),
            head_dim_v=c,
            softmax_scale=float(scale),
            causal=self.causal,
        )

    def _rows(self, rng: np.random.Generator, lead: tuple[int, ...], c: int, d: int) -> Array:
        rows = rng.standard_normal((*lead, d))
        mean = rng.choice([-1.0, 1.0], c)
        spread = np.full(c, 0.5)
        if self.regime == "offset":
            mean, spread = 8 * mean, np.full(c, 0.25)
        if self.regime == "outlier":
            mean, spread = mean, np.where(rng.random(c) < 0.1, 15.0, 0.5)
        rows[..., :c] = mean + spread * rows[..., :c]
        if self.regime == "cancelling":
            rows[..., 1:c:2] = rows[..., 1:c:2] / CANCELLATION - rows[..., 0 : c - 1 : 2]
        if self.regime == "ties":
            rows[1::2] = rows[: rows.shape[0] // 2]
        return rows

    def latent_weights(self) -> tuple[Array, MLAConfig, Array]:
        """(kv_b_proj, config, q_nope [b, s, h, n]) of the explicit form behind the case, rounded to the dtype."""
        config = MLAConfig(
            hidden_size=1,
            num_heads=self.num_heads,
            q_lora_rank=None,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        rng = np.random.default_rng([self.seed, 1])
        kv_b_proj = rng.standard_normal(weight_shapes(config)["kv_b_proj"]) / np.sqrt(self.kv_lora_rank)
        q_nope = rng.standard_normal((len(self.seqlens), self.s, self.num_heads, self.qk_nope_head_dim))
        return round_to(kv_b_proj, self.dtype), config, round_to(q_nope, self.dtype)
