"""``absorb``: the key and value matrices of each head, which weight absorption folds into queries and outputs.

kv_b_proj is [h·(n+v), c], viewed as (h, n + v, c). ``config`` is an ``MLAConfig``. Returned are w_uk [h, n, c], the first n
rows of each head, and w_uv [h, v, c], the others; they may be views of kv_b_proj.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.operation import Answers, Exactly, Operation, as_it_is
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import absorb
from mla_spec.reference.typing import Array
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, transposed, viewed


@dataclass(frozen=True)
class AbsorbInputs:
    """Arguments of ``absorb``."""

    kv_b_proj: Array  # [h·(n+v), c], numbers of the dtype
    config: MLAConfig


def build(case: DecodeCase) -> AbsorbInputs:
    """The weight of the explicit form behind a case of ``decode``."""
    kv_b_proj, config, _ = case.latent_weights()
    return AbsorbInputs(kv_b_proj, config)


def expected(inputs: AbsorbInputs, profile: Profile, supports: Supports) -> Answers:
    """Rows of kv_b_proj, bit for bit."""
    w_uk, w_uv = absorb(inputs.kv_b_proj, inputs.config)
    return Exactly(w_uk), Exactly(w_uv)


OPERATION = Operation(
    name="absorb",
    contract=__doc__,
    case=DecodeCase,
    build=build,
    recorded=as_it_is,
    arguments=(Argument("kv_b_proj", "[h·(n+v), c]", far=True),),
    keywords=("config",),
    outputs=(
        Output("w_uk", "[h, n, c]", lambda i: absorb(i.kv_b_proj, i.config)[0].shape, view=True),
        Output("w_uv", "[h, v, c]", lambda i: absorb(i.kv_b_proj, i.config)[1].shape, view=True),
    ),
    expected=expected,
    views={
        "kv_b_proj as a slice of wider rows": viewed(slice_of_wider, "kv_b_proj", -1, ROW_PADDING),
        "kv_b_proj stored [in, out]": viewed(transposed, "kv_b_proj", 0, 1),
    },
    regimes=DECODE.regimes,
    others=lambda case: (build(replace(case, seed=case.seed + 1)),),
    distant=lambda case: build(replace(case, num_heads=1, qk_nope_head_dim=2, v_head_dim=1)),
)
