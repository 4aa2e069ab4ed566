"""Cases of ``write_cache``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.operations.case import Case
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array, IntArray


@dataclass(frozen=True)
class WriteInputs:
    """Arguments of ``write_cache``: float64 values exactly representable in the dtype, and slots."""

    latent: Array  # [n, c]
    k_pe: Array  # [n, r]
    kv_cache: Array  # [pages, page_size, 1, c+r]
    slot_mapping: IntArray  # [n], page · page_size + row, or -1; none twice but -1


@dataclass(frozen=True, kw_only=True)
class WriteCase(Case):
    """New tokens and the slots they go to; the share ``skipped`` of them has slot -1.

    Rows hold ordinary numbers and, here and there, -0, infinities, NaN, the largest and the smallest number.
    """

    kind = "write"
    tokens: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    page_size: int = 1
    skipped: float = 0.0

    def build(self) -> WriteInputs:
        """The inputs: a pool with spare pages, whose slots are taken in random order."""
        rng = self.generator()
        pages = -(-self.tokens // self.page_size) + 2
        width = self.kv_lora_rank + self.qk_rope_head_dim
        rows = self._numbers(rng, (self.tokens, width))
        slots = rng.permutation(pages * self.page_size)[: self.tokens]
        return WriteInputs(
            latent=rows[:, : self.kv_lora_rank],
            k_pe=rows[:, self.kv_lora_rank :],
            kv_cache=self._numbers(rng, (pages, self.page_size, 1, width)),
            slot_mapping=np.where(rng.random(self.tokens) < self.skipped, -1, slots).astype(np.int64),
        )

    def _numbers(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        fmt = format_of(self.dtype)
        special = [-0.0, np.inf, -np.inf, np.nan, fmt.max_finite, fmt.smallest_subnormal]
        x = np.where(rng.random(shape) < 0.03, rng.choice(special, shape), rng.standard_normal(shape))
        return round_to(x, self.dtype)
