"""Cases of ``merge``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_spec.operations.case import Case
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array


@dataclass(frozen=True)
class MergeInputs:
    """Arguments of ``merge``: float64 values exactly representable in the dtype, and in that of LSEs."""

    outs: Array  # [parts, (b,) s, h, dv]
    lses: Array  # [parts, (b,) h, s], -inf in parts without keys


@dataclass(frozen=True, kw_only=True)
class MergeCase(Case):
    """Parts to merge; batch 0 means no batch axis, as in ``prefill``.

    LSEs have mean ``lse_mean`` and standard deviation ``lse_std``; the share ``empty`` of the rows of parts have no keys.
    A column of outputs has one sign, so that merged ones do not average out to 0.
    """

    kind = "merge"
    parts: int = 1
    batch: int = 0
    s: int = 1
    num_heads: int = 1
    head_dim_v: int = 1
    lse_mean: float = 0.0
    lse_std: float = 1.0
    empty: float = 0.0

    def build(self) -> MergeInputs:
        """The inputs; parts without keys have output 0."""
        rng = self.generator()
        lead = (self.parts, self.batch) if self.batch else (self.parts,)
        lses = self.lse_mean + self.lse_std * rng.standard_normal((*lead, self.num_heads, self.s))
        outs = rng.uniform(0.25, 2.0, (*lead, self.s, self.num_heads, self.head_dim_v))
        outs = outs * rng.choice([-1.0, 1.0], self.head_dim_v)
        empty = rng.random(lses.shape) < self.empty
        lses = np.where(empty, -np.inf, round_to(lses, "float64" if self.dtype == "float64" else "float32"))
        outs = np.where(np.swapaxes(empty, -1, -2)[..., None], 0.0, round_to(outs, self.dtype))
        return MergeInputs(outs=outs, lses=lses)
