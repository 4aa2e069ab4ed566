"""What a model's MLA is made of: dimensions and rotary embedding, in DeepSeek's names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from typing import Any, Literal

DIGITS = Context(prec=60)
"""Decimal arithmetic in which rotary frequencies are exact for every purpose of float64."""

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")


def _require_positive_int(owner: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{owner}: {name} must be a positive finite number, got {value!r}")


def yarn_mscale(factor: float, mscale: float) -> float:
    """DeepSeek's yarn_get_mscale: 0.1 · mscale · ln(factor) + 1, and 1 for factor ≤ 1.

    Source: DeepSeek-V3 inference/model.py; YaRN (arXiv 2309.00071), section 3.4.
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071) as DeepSeek-V2 and V3 use it.

    Published implementations disagree on four points; each is a field here.

    Args:
        factor: context extension s ≥ 1.
        original_max_position_embeddings: context length of the pre-training, in tokens.
        beta_fast, beta_slow: rotations over the original context at which interpolation begins and is complete.
        mscale, mscale_all_dim: DeepSeek's temperature parameters; None where a checkpoint does not state them.
        attention_factor: factor on cos and sin; None derives it by ``attention_factor_rule``.
        attention_factor_rule: where ``attention_factor`` is None. "ratio" is mscale/mscale_all_dim in the sense of
            ``yarn_mscale``, an absent one counting as (1, 0) (vLLM); "transformers" is the same ratio when both are given
            and nonzero, else yarn_mscale(factor, 1).
        softmax_mscale: multiplies the softmax scale by its square; None means yarn_mscale(factor, mscale_all_dim)
            (DeepSeek), 1.0 none (Mistral-Large-3).
        applies: "always" (transformers, vLLM), or "beyond_original": only when the model's max_position_embeddings
            exceeds the original length (DeepSeek's inference code).
        truncate: floor and ceil the correction range (DeepSeek); False keeps it fractional (gpt-oss).
        ramp_guard: width of the ramp when the correction range is empty (low == high). None refuses such a
            configuration; DeepSeek's code uses 0.001.

    Raises:
        ValueError: a parameter is out of range.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = 1.0
    mscale_all_dim: float | None = 1.0
    attention_factor: float | None = None
    attention_factor_rule: Literal["ratio", "transformers"] = "ratio"
    softmax_mscale: float | None = None
    applies: Literal["always", "beyond_original"] = "always"
    truncate: bool = True
    ramp_guard: float | None = None

    def __post_init__(self) -> None:
        _require_positive("YarnScaling", factor=self.factor, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        _require_positive_int("YarnScaling", original_max_position_embeddings=self.original_max_position_embeddings)
        optional = {name: getattr(self, name) for name in ("attention_factor", "softmax_mscale", "ramp_guard")}
        _require_positive("YarnScaling", **{name: value for name, value in optional.items() if value is not None})
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"YarnScaling: {name} must be a finite number, not negative, or None, got {value!r}")
        if self.factor < 1:
            raise ValueError(f"YarnScaling: factor must be at least 1, got {self.factor!r}")
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"YarnScaling: beta_fast must not be below beta_slow, got {self.beta_fast!r} < {self.beta_slow!r}"
            )
        if self.attention_factor_rule not in ("ratio", "transformers"):
            raise ValueError(
                "YarnScaling: attention_factor_rule must be 'ratio' or 'transformers', "
                f"got {self.attention_factor_rule!r}"
            )
        if self.applies not in ("always", "beyond_original"):
            raise ValueError(f"YarnScaling: applies must be 'always' or 'beyond_original', got {self.applies!r}")

    @property
    def cos_sin_factor(self) -> float:
        """The factor on cos and sin: 1.0 whenever mscale equals mscale_all_dim."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.attention_factor_rule == "transformers" and not (self.mscale and self.mscale_all_dim):
            return yarn_mscale(self.factor, 1.0)
        mscale = 1.0 if self.mscale is None else self.mscale
        mscale_all_dim = 0.0 if self.mscale_all_dim is None else self.mscale_all_dim
        return yarn_mscale(self.factor, mscale) / yarn_mscale(self.factor, mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """mscale², the factor on the softmax scale (DeepSeek-V3 inference/model.py, class MLA)."""
        if self.softmax_mscale is not None:
            return self.softmax_mscale**2
        return yarn_mscale(self.factor, self.mscale_all_dim or 0.0) ** 2


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the ``dim`` rope dimensions.

    Args:
        dim: width r of the rotated part (qk_rope_head_dim); even.
        theta: base of the frequencies theta^(-2i/dim).
        interleaved: True pairs (2i, 2i+1) (DeepSeek-V2/V3), False pairs (i, i + dim/2) (GPT-NeoX).
        yarn: YaRN scaling, or None.
        max_position_embeddings: the model's context; only read by ``YarnScaling.applies == "beyond_original"``.

    Raises:
        ValueError: odd or non-positive dim, non-positive theta, or a YaRN ramp that is inverted or, without a guard, has no width.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = True
    yarn: YarnScaling | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        _require_positive_int("RopeConfig", dim=self.dim)
        if self.dim % 2:
            raise ValueError(f"RopeConfig: dim (qk_rope_head_dim) must be even, got {self.dim}")
        _require_positive("RopeConfig", theta=self.theta)
        if self.theta <= 1:
            raise ValueError(f"RopeConfig: theta must exceed 1, got {self.theta!r}")
        if self.yarn is not None and self.yarn.applies == "beyond_original" and self.max_position_embeddings is None:
            raise ValueError("RopeConfig: yarn.applies='beyond_original' needs max_position_embeddings, got None")
        if self.active_yarn is not None:
            low, high = self.yarn_correction_range()
            if low > high:
                raise ValueError(
                    f"RopeConfig: YaRN correction range is inverted (low {low:g} > high {high:g}) for dim={self.dim}, "
                    f"theta={self.theta:g}; choose other betas"
                )
            if low == high and self.active_yarn.ramp_guard is None:
                raise ValueError(
                    f"RopeConfig: YaRN correction range is empty (low == high == {low:g}) for dim={self.dim}, "
                    f"theta={self.theta:g}; set ramp_guard (DeepSeek's code uses 0.001) or other betas"
                )

    @classmethod
    def from_checkpoint(
        cls,
        *,
        dim: int,
        theta: float,
        interleaved: bool,
        rope_scaling: dict[str, Any] | None,
        max_position_embeddings: int | None = None,
    ) -> RopeConfig:
        """Read a checkpoint's ``rope_scaling`` entry.

        Raises:
            ValueError: the scaling type is not "default" or "yarn", or a parameter is unknown.
        """
        scaling = dict(rope_scaling or {})
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        if kind not in ("default", "yarn"):
            raise ValueError(f"rope_scaling: unknown rope type {kind!r}; known types are 'default' and 'yarn'")
        yarn = None
        if kind == "yarn":
            scaling.setdefault("mscale", None)
            scaling.setdefault("mscale_all_dim", None)
            unknown = sorted(set(scaling) - set(YarnScaling.__dataclass_fields__))
            if unknown:
                raise ValueError(f"rope_scaling: unknown YaRN parameter {unknown[0]!r}")
            yarn = YarnScaling(ramp_guard=0.001, **scaling)
        return cls(
            dim=dim,
            theta=float(theta),
            interleaved=interleaved,
            yarn=yarn,
            max_position_embeddings=max_position_embeddings,
        )

    @property
    def active_yarn(self) -> YarnScaling | None:
        """The YaRN scaling in effect, after the ``applies`` rule."""
        if self.yarn is None or self.yarn.applies == "always":
            return self.yarn
        assert self.max_position_embeddings is not None
        beyond = self.max_position_embeddings > self.yarn.original_max_position_embeddings
        return self.yarn if beyond else None

    @property
    def cos_sin_factor(self) -> float:
        """The factor on cos and sin; 1.0 without YaRN."""
        return 1.0 if self.active_yarn is None else self.active_yarn.cos_sin_factor

    def yarn_correction_range(self) -> tuple[float, float]:
        """(low, high): the pair indices between which YaRN blends from extrapolation to interpolation.

        low = floor(d(beta_fast)), high = ceil(d(beta_slow)), clamped to [0, dim - 1], where
        d(β) = dim · ln(L / (2πβ)) / (2 ln theta) and L is the original context (YaRN, section 3.2; DeepSeek-V3
        inference/model.py, find_correction_range).
        """
        low, high = self.exact_yarn_correction_range()
        return float(low), float(high)

    def exact_yarn_correction_range(self) -> tuple[Decimal, Decimal]:
        """``yarn_correction_range`` to about 55 digits."""
        yarn = self.yarn
        if yarn is None:
            raise ValueError("yarn_correction_range: this RopeConfig has no YaRN scaling")
        with localcontext(DIGITS):

            def pair_index(rotations: float) -> Decimal:
                wavelength = yarn.original_max_position_embeddings / (Decimal(rotations) * 2 * PI)
                return self.dim * wavelength.ln() / (2 * Decimal(self.theta).ln())

            low, high = pair_index(yarn.beta_fast), pair_index(yarn.beta_slow)
            if yarn.truncate:
                low, high = Decimal(math.floor(low)), Decimal(math.ceil(high))
            return max(low, Decimal(0)), min(high, Decimal(self.dim - 1))


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Dimensions of one MLA layer (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).

    Args:
        hidden_size: e, width of the residual stream.
        num_heads: h.
        q_lora_rank: rank of the query compression, or None where queries are projected directly.
        kv_lora_rank: c, width of the latent.
        qk_nope_head_dim: n, query and key dims without position.
        qk_rope_head_dim: r, width of the shared rotated key; 0 where a model has none.
        v_head_dim: v.
        rope: rotary embedding of the r dims. None leaves them unrotated (NoPE models such as Kimi-Linear).
        latent_norm_eps: eps of the RMSNorms on the two latents. DeepSeek's own code uses 1e-6 whatever the
            checkpoint's rms_norm_eps says; vLLM and SGLang pass rms_norm_eps. State it to choose.
        softmax_scale: overrides the default scale.

    Raises:
        ValueError: a dimension is not a positive integer, or rope.dim differs from qk_rope_head_dim.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig | None = None
    latent_norm_eps: float = 1e-6
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        _require_positive_int(
            "MLAConfig",
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        if self.q_lora_rank is not None:
            _require_positive_int("MLAConfig", q_lora_rank=self.q_lora_rank)
        if self.qk_rope_head_dim != 0:
            _require_positive_int("MLAConfig", qk_rope_head_dim=self.qk_rope_head_dim)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"MLAConfig: qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.rope is not None and self.rope.dim != self.qk_rope_head_dim:
            raise ValueError(
                f"MLAConfig: rope.dim must equal qk_rope_head_dim, got {self.rope.dim} and {self.qk_rope_head_dim}"
            )
        _require_positive("MLAConfig", latent_norm_eps=self.latent_norm_eps)
        if self.softmax_scale is not None:
            _require_positive("MLAConfig", softmax_scale=self.softmax_scale)

    @property
    def qk_head_dim(self) -> int:
        """N + r."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """C + r: elements of one cache row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """The softmax scale: (n + r)^-1/2, times YaRN's mscale² where YaRN is in effect."""
        if self.softmax_scale is not None:
            return self.softmax_scale
        yarn = None if self.rope is None else self.rope.active_yarn
        return 1.0 / math.sqrt(self.qk_head_dim) * (1.0 if yarn is None else yarn.softmax_factor)

    @classmethod
    def published(cls, name: str) -> MLAConfig:
        """The configuration of a published model, e.g. ``MLAConfig.published("DeepSeek-V3")``.

        Raises:
            ValueError: the model is unknown (the message suggests close names), is not MLA, or has an option or an
                unpublished field that this class cannot express (the message names it).
        """
        from mla_spec.reference.published import published_model

        return published_model(name).mla_config()
