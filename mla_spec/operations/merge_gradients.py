"""Gradients through ``merge``, and through ``prefill`` of parts of the keys that are merged, as autograd gives them.

They are judged where ``supports.backward`` names the operations, or names none and the output requires a gradient. outs and lses
get one of their shape and dtype, for any gradient of out, whatever its strides, and of the merged LSE where
``supports.lse_backward``. Parts without keys have gradient 0.

In ring attention each rank attends to some of the keys, and the parts are merged. What a loss gives to q is then the sum of
what it gives to the q of each part, through their outputs and their LSEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from mla_spec.operations.case import Case
from mla_spec.operations.gradients import (
    NOISE,
    BackwardDriver,
    Branched,
    Gradients,
    PrefillBackwardCase,
    Tensors,
    leaves,
)
from mla_spec.operations.merge import OPERATION as MERGE
from mla_spec.operations.merge import MergeCase, MergeInputs
from mla_spec.operations.operation import View
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillInputs
from mla_spec.operations.regimes import Regime
from mla_spec.reference.formats import round_to
from mla_spec.reference.merge import part_columns
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, transposed, viewed


@dataclass(frozen=True)
class MergeBackwardInputs:
    """Arguments of ``merge``, and the gradients of its outputs."""

    forward: MergeInputs
    out_grad: Array  # [(b,) s, h, dv], numbers of the dtype
    lse_grad: Array  # [(b,) h, s], numbers of float32


@dataclass(frozen=True, kw_only=True)
class MergeBackwardCase(MergeCase):
    """As ``MergeCase``; outputs of parts have sizes of their own, and gradients the signs of outputs.

    So few terms of Σ_d dO_d O_d cancel, and it differs from part to part. The gradient of the LSE is as large as such sums.
    """

    kind = "merge_backward"

    def with_gradients(self) -> MergeBackwardInputs:
        """The inputs, and the gradients that arrive."""
        forward = self.build()
        rng = np.random.default_rng([self.seed, 12])
        sign = rng.choice([-1.0, 1.0], self.head_dim_v)
        size = 2.0 ** rng.integers(-2, 1, forward.lses.shape)  # [parts, (b,) h, s]
        outs = sign * part_columns(size) * np.abs(forward.outs)
        out_grad = sign * (1 + NOISE * rng.standard_normal(outs.shape[1:]))
        lse_grad = self.head_dim_v * (
            rng.choice([-1.0, 1.0], size.shape[1:]) + NOISE * rng.standard_normal(size.shape[1:])
        )
        return MergeBackwardInputs(
            MergeInputs(outs, forward.lses), round_to(out_grad, self.dtype), round_to(lse_grad, "float32")
        )


@dataclass(frozen=True)
class KeyPart:
    """``prefill`` of all queries and some of the keys."""

    forward: PrefillInputs
    keys: IntArray  # its key tokens among those of the whole


@dataclass(frozen=True, kw_only=True)
class RingCase(PrefillBackwardCase):
    """As ``PrefillBackwardCase``, the keys of each sequence cut into ``parts`` runs, of which some may be empty.

    The last run has the mask of the whole. All queries see all keys of the others.
    """

    kind = "ring_backward"
    known_regimes: ClassVar[tuple[str, ...]] = ("typical", "outlier", "negative", "aligned")
    parts: int = 2

    def key_parts(self, whole: PrefillInputs) -> tuple[KeyPart, ...]:
        """``whole`` in parts; each has keys of the sequence with the most."""
        rng = np.random.default_rng([self.seed, 14])
        longest = int(np.argmax(self.seqlens_k))
        edges = np.array([self._edges(rng, i, i == longest) for i in range(len(self.seqlens_k))])  # [b, parts + 1]
        starts = whole.cu_seqlens_k[:-1, None] + edges
        return tuple(
            self._part(whole, starts[:, i], starts[:, i + 1], last=i == self.parts - 1) for i in range(self.parts)
        )

    def _edges(self, rng: np.random.Generator, sequence: int, filled: bool) -> list[int]:
        """Where runs of keys of a sequence begin and end; with ``filled`` none is empty."""
        s, t = self.seqlens_q[sequence], self.seqlens_k[sequence]
        seen_by_all = min(t, max(0, t - s + 1)) if self.causal else t
        if filled:
            inner = 1 + rng.permutation(min(seen_by_all, t - 1))[: self.parts - 1]
        else:
            inner = rng.integers(0, seen_by_all + 1, self.parts - 1)
        return [0, *sorted(int(n) for n in inner), t]

    def _part(self, whole: PrefillInputs, starts: IntArray, ends: IntArray, *, last: bool) -> KeyPart:
        keys = np.concatenate([np.arange(*ends_of) for ends_of in zip(starts, ends, strict=True)])
        forward = replace(
            whole,
            k=whole.k[keys],
            v=whole.v[keys],
            cu_seqlens_k=np.cumsum([0, *(ends - starts)]).astype(np.int32),
            causal=whole.causal and last,
        )
        return KeyPart(forward, keys)


class MergeGradientDriver:
    """A driver's subject, whose ``merge`` and ``prefill`` autograd records."""

    def __init__(self, driver: Driver) -> None:
        self.driver = BackwardDriver.of(driver)

    def tensors(self, inputs: MergeBackwardInputs, *, through_lse: bool = False) -> Tensors:
        """The arguments by name, "out_grad", and perhaps "lse_grad"."""
        tensors = self.driver.tensors(MERGE, inputs.forward) | {"out_grad": self.driver.tensor(inputs.out_grad)}
        if through_lse:
            tensors["lse_grad"] = self.driver.lse_grad(inputs.lse_grad)
        return tensors

    def gradients(self, tensors: Tensors, names: Sequence[str] = ("outs", "lses")) -> Gradients:
        """Gradients of outs and lses, or only those of ``names``; the others require none."""
        recorded = leaves(tensors, names)
        out, lse = self.driver.raw(MERGE, None, recorded)
        return self.driver.gradients("merge", recorded, names, out, lse)

    def beside_a_branch(self, tensors: Tensors) -> Branched:
        """Gradients of outs and lses where another branch is added to out."""
        return self.driver.beside_a_branch(MERGE, None, tensors, ("outs", "lses"))

    def through_parts(self, parts: Sequence[KeyPart], out_grad: Array) -> list[Gradients]:
        """Gradients of the q, k and v of every part, for the gradient of the merged output."""
        recorded = [leaves(self.driver.tensors(PREFILL, part.forward), "qkv") for part in parts]
        returned = [
            self.driver.raw(PREFILL, part.forward, tensors) for part, tensors in zip(parts, recorded, strict=True)
        ]
        for out, lse in returned:
            self.driver.require_recorded("prefill", "out", out, "qkv")
            self.driver.require_recorded("prefill", "lse", lse, "qk")
        outs, lses = (torch.stack(x) for x in zip(*returned, strict=True))
        out, lse = self.driver.raw(MERGE, None, {"outs": outs, "lses": lses.to(self.driver.wide)})
        named = {f"{name} of part {i}": tensors[name] for i, tensors in enumerate(recorded) for name in "qkv"}
        tensors = named | {"out_grad": self.driver.tensor(out_grad)}
        found = self.driver.gradients("prefill and merge", tensors, list(named), out, lse)
        return [{name: found[f"{name} of part {i}"] for name in "qkv"} for i in range(len(parts))]


REGIMES: dict[type[Case], tuple[Regime, ...]] = {
    MergeBackwardCase: MERGE.regimes,
    RingCase: (
        *PREFILL.regimes,
        ("two parts", lambda case: case.parts == 2),
        ("three parts", lambda case: case.parts == 3),
    ),
}

OUT_GRAD_VIEWS: dict[str, View] = {
    "out_grad as a slice of a wider row": viewed(slice_of_wider, "out_grad", -1, ROW_PADDING),
    "out_grad stored with heads before queries": viewed(transposed, "out_grad", -3, -2),
}
"""Ways to pass the same gradient of out to a backward pass."""
