"""``rope``: rotary position embedding of vectors.

x is [positions.shape..., r] or [positions.shape..., h, r]; positions are int64, in any order. ``rope`` is a ``RopeConfig``,
which says the layout of the pairs, the frequencies and the factor on cos and sin. Returned is x rotated, in the shape and
dtype of x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.operations.case import Case
from mla_spec.operations.lattice import Lattice
from mla_spec.operations.operation import Answers, Operation, Within, as_it_is
from mla_spec.operations.regimes import Regime, values
from mla_spec.reference.config import LongRopeScaling, RopeConfig, YarnScaling
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, every_other, slice_of_wider, transposed, viewed


def _yarn(**options: Any) -> YarnScaling:
    return YarnScaling(**{"factor": 8, "original_max_position_embeddings": 256, "ramp_guard": 0.001} | options)


YARN = {
    "none": None,
    "deepseek-v3": YarnScaling(factor=40, original_max_position_embeddings=4096, ramp_guard=0.001),
    "short": YarnScaling(factor=4, original_max_position_embeddings=64, beta_fast=8, ramp_guard=0.001),
    "kimi-k2": YarnScaling(factor=32, original_max_position_embeddings=4096, beta_fast=1, ramp_guard=0.001),
    "ratio": YarnScaling(
        factor=8, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=0.5, ramp_guard=0.001
    ),
    "cos-sin-only": YarnScaling(
        factor=16, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.0, ramp_guard=0.001
    ),
    "empty-range": YarnScaling(factor=4, original_max_position_embeddings=6, ramp_guard=0.001),
    "attention-factor": _yarn(attention_factor=1.25),
    "softmax-mscale": _yarn(softmax_mscale=0.75),
    "fractional": _yarn(truncate=False),
    "no-mscale": _yarn(mscale=None, mscale_all_dim=None),
    "mscale": _yarn(mscale=1.5, mscale_all_dim=0.5),
    "transformers-mscale-only": _yarn(mscale=1.5, mscale_all_dim=None, attention_factor_rule="transformers"),
    "betas": _yarn(beta_fast=16, beta_slow=2),
    "transformers-ratio": _yarn(mscale_all_dim=0.5, attention_factor_rule="transformers"),
    "transformers-absent": _yarn(mscale=None, mscale_all_dim=None, attention_factor_rule="transformers"),
    "transformers-no-mscale": _yarn(mscale=None, mscale_all_dim=0.5, attention_factor_rule="transformers"),
    "transformers-zero": _yarn(mscale=0.5, mscale_all_dim=0.0, attention_factor_rule="transformers"),
    "range-beyond-dims": YarnScaling(factor=4, original_max_position_embeddings=131072, ramp_guard=0.001),
    "always-within": _yarn(),
    "beyond-within": _yarn(applies="beyond_original"),
    "beyond-at": _yarn(applies="beyond_original"),
    "beyond-above": _yarn(applies="beyond_original"),
    "beyond-stated": _yarn(applies="beyond_original", attention_factor=1.25, softmax_mscale=0.75),
}
"""YaRN scalings by the name a case holds. "ratio" and "cos-sin-only" put a factor on cos and sin; the correction range of
"empty-range" has no width, so that its ramp is that of the guard; with the default theta that of "range-beyond-dims" ends
after the last pair. The later ones state, or leave out, one option each."""

CONTEXTS = {"always-within": 128, "beyond-within": 128, "beyond-at": 256, "beyond-above": 257, "beyond-stated": 128}
"""The max_position_embeddings of a scaling that states it: below, at or above its original context of 256."""

LONGROPE = {
    "none": None,
    "short": 4096,
    "long": 131072,
    "within": 2048,
    "above": 4097,
    "attention-factor": 8192,
    "attention-factor-within": 2048,
    "factor": 8192,
    "factor-within": 4096,
}
"""The max_position_embeddings that put the short or the long factors into effect, by the name a case holds: those within and
at the original context of 4096 the short ones. The later ones state what ``LONGROPE_STATED`` says."""

LONGROPE_STATED: dict[str, Any] = {
    "attention-factor": {"attention_factor": 1.25},
    "attention-factor-within": {"attention_factor": 0.75},
    "factor": {"factor": 32.0},
    "factor-within": {"factor": 8.0},
}
"""The context extension, or the factor on cos and sin, that a LongRoPE states."""


def longrope_factors(dim: int) -> dict[str, Any]:
    """The short and long factors of a LongRoPE over ``dim`` dims: all different, growing with the wavelength."""
    return {
        "short_factor": tuple(1 + i / 8 for i in range(dim // 2)),
        "long_factor": tuple(1.5 + 2 * i for i in range(dim // 2)),
    }


def make_rope(*, dim: int, layout: str, theta: float, yarn: str, longrope: str = "none") -> RopeConfig | None:
    """The RopeConfig a case describes; None for layout "none"."""
    if layout == "none" or dim == 0:
        return None
    context = LONGROPE[longrope]
    return RopeConfig(
        dim=dim,
        theta=theta,
        interleaved=layout == "interleaved",
        yarn=YARN[yarn],
        longrope=None
        if context is None
        else LongRopeScaling(
            original_max_position_embeddings=4096,
            **LONGROPE_STATED.get(longrope, {}),
            **longrope_factors(dim),
        ),
        max_position_embeddings=CONTEXTS.get(yarn, context),
    )


REGIMES: tuple[Regime, ...] = (
    *values("layout", "interleaved", "half"),
    ("unscaled", lambda case: case.yarn == case.longrope == "none"),
    ("yarn", lambda case: case.yarn != "none"),
    ("longrope", lambda case: case.longrope != "none"),
    ("from position 0", lambda case: case.start == 0),
    ("far positions", lambda case: case.start >= 60),
)


@dataclass(frozen=True)
class RopeInputs:
    """Arguments of ``rope``."""

    x: Array  # [batch, s, (h,) r], numbers of the dtype
    positions: IntArray  # [batch, s]
    rope: RopeConfig


@dataclass(frozen=True, kw_only=True)
class RopeCase(Case):
    """Vectors to rotate: x [batch, s, (heads,) dim] at positions start, start + stride, ...; heads 0 means no axis.

    ``shift`` is the common shift of the relative-position law.
    """

    kind = "rope"
    batch: int = 1
    s: int = 1
    heads: int = 0
    dim: int = 2
    layout: str = "interleaved"
    theta: float = 10000.0
    yarn: str = "none"
    longrope: str = "none"
    start: int = 0
    stride: int = 1
    shift: int = 1

    @property
    def rope(self) -> RopeConfig:
        rope = make_rope(dim=self.dim, layout=self.layout, theta=self.theta, yarn=self.yarn, longrope=self.longrope)
        assert rope is not None
        return rope

    def positions(self) -> IntArray:
        """[batch, s], different in each sequence."""
        return self.start + self.stride * np.arange(self.s) + 3 * np.arange(self.batch)[:, None]

    def build(self) -> RopeInputs:
        """The inputs."""
        return RopeInputs(self.vectors(1)[0], self.positions(), self.rope)

    def vectors(self, count: int) -> list[Array]:
        """``count`` arrays of standard normal values, rounded to the dtype."""
        shape = (self.batch, self.s, *([self.heads] if self.heads else []), self.dim)
        rng = self.generator()
        return [round_to(rng.standard_normal(shape), self.dtype) for _ in range(count)]


def expected(inputs: RopeInputs, profile: Profile, supports: Supports) -> Answers:
    """Every pair turned by its angle."""
    return (Within(*rope_with_bound(inputs.x, inputs.positions, inputs.rope, profile.rope, output=profile.dtype)),)


def _others(case: RopeCase) -> tuple[RopeInputs, ...]:
    """Later positions; the same positions in another order of the sequences, and of their inner tokens; another theta."""
    later = replace(case, seed=case.seed + 1, start=case.start + 1).build()
    permuted = replace(case, seed=case.seed + 2).build()
    faster = replace(case, seed=case.seed + 3, theta=case.theta / 2).build()
    return later, replace(permuted, positions=permuted.positions[::-1]), _with_other_inner_tokens(permuted), faster


def _with_other_inner_tokens(inputs: RopeInputs) -> RopeInputs:
    """The same first and last positions, with the same sum, and the others in another order."""
    positions = inputs.positions.ravel().copy()
    positions[1:-1] = positions[-2:0:-1]
    return replace(inputs, positions=positions.reshape(inputs.positions.shape))


LATTICE = Lattice(
    law="test_rope_agrees_with_reference",
    kind="layout",
    classes=("interleaved", "half", "interleaved, YaRN", "half, YaRN"),
    axes={"heads": (1, 2, 3, 8, 16, 32, 64, 128), "dims": (2, 8, 16, 32, 64, 128), "tokens": (1, 2, 3, 17, 128)},
    fields=lambda supports, name, sizes: {
        "s": sizes["tokens"],
        "heads": sizes["heads"],
        "dim": sizes["dims"],
        "layout": name.partition(",")[0],
        "yarn": "deepseek-v3" if "YaRN" in name else "none",
    },
    declared=lambda supports, name, _: (
        name.partition(",")[0] in supports.rope_layouts and (supports.yarn or "YaRN" not in name)
    ),
)

OPERATION = Operation(
    name="rope",
    contract=__doc__,
    case=RopeCase,
    recorded=as_it_is,
    arguments=(
        Argument("x", "[..., r] or [..., h, r]", far=True),
        Argument("positions", "[...]", "int64"),
    ),
    keywords=("rope",),
    outputs=(Output("out", "like x", lambda inputs: inputs.x.shape, what="rope output"),),
    expected=expected,
    views={
        "x as a slice of a wider row": viewed(slice_of_wider, "x", -1, ROW_PADDING),
        "x with its first axes exchanged in memory": viewed(transposed, "x", 0, 1),
        "x stored with heads before tokens": viewed(transposed, "x", -3, -2),
        "x with its last axes exchanged in memory": viewed(transposed, "x", -2, -1),
        "positions as every other element": viewed(every_other, "positions"),
    },
    regimes=REGIMES,
    others=_others,
    distant=lambda case: replace(case, batch=3).build(),
    lattice=LATTICE,
)
