"""``merge``: parts of one attention over disjoint keys, joined by their LSEs.

outs are [parts, (b,) s, h, v] and lses [parts, (b,) h, s], with a batch axis as ``decode`` returns them or without one as
``prefill`` does. LSEs are natural logarithms, in float32, or float64 where the outs are. A row of a
part may have no keys. Its LSE is what ``supports.empty_row`` declares, such as -inf; its output is any finite number, and has
no weight. A row of which no part has keys gives the declared output and LSE.

Returned are out [(b,) s, h, v] in the dtype of the outs, and the LSE [(b,) h, s] in float32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.merge import BoundedMerge, merge_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.operations.case import Case
from mla_spec.operations.decode import attention_expected
from mla_spec.operations.operation import Operation, as_it_is
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, transposed, viewed


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


def merge_expected(inputs: MergeInputs, profile: Profile) -> BoundedMerge:
    """The exact merge and its bound."""
    return merge_with_bound(inputs.outs, inputs.lses, profile)


OPERATION = Operation(
    name="merge",
    sizes=("num_heads",),
    contract=__doc__,
    case=MergeCase,
    recorded=as_it_is,
    arguments=(
        Argument("outs", "[parts, (b,) s, h, v]", far=True),
        Argument("lses", "[parts, (b,) h, s]", "lse", far=True),
    ),
    outputs=(
        Output("out", "[(b,) s, h, v]", lambda inputs: inputs.outs.shape[1:], what="merged out"),
        Output("lse", "[(b,) h, s]", lambda inputs: inputs.lses.shape[1:], "float32 or better", what="merged lse"),
    ),
    expected=lambda inputs, profile, supports: attention_expected(merge_expected(inputs, profile), supports),
    views={
        "outs with the parts innermost in memory": viewed(transposed, "outs", 0, -1),
        "outs as slices of wider rows": viewed(slice_of_wider, "outs", -1, ROW_PADDING),
        "outs stored with heads before queries": viewed(transposed, "outs", -3, -2),
        "lses stored with queries before heads": viewed(transposed, "lses", -2, -1),
        "lses narrowed from longer rows": viewed(slice_of_wider, "lses", -1, 3),
    },
    regimes=(
        ("one part", lambda case: case.parts == 1),
        ("two parts and more", lambda case: case.parts > 1),
        ("near LSEs", lambda case: case.lse_std <= 1),
        ("LSEs far apart", lambda case: case.lse_std >= 30),
        ("LSEs near 0", lambda case: abs(case.lse_mean) <= 5),
        ("LSEs beyond exp", lambda case: abs(case.lse_mean) >= 200),
        ("empty parts", lambda case: 0 < case.empty < 1),
        ("only empty parts", lambda case: case.empty == 1),
        ("batched", lambda case: case.batch > 0),
        ("packed", lambda case: case.batch == 0),
    ),
    others=lambda case: (replace(case, seed=case.seed + 1).build(),),
    distant=lambda case: replace(case, parts=3).build(),
)
