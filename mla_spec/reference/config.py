"""What a model's MLA is made of: dimensions and rotary embedding, in DeepSeek's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mla_spec.reference.scaling import (
    Llama4Scaling,
    LongRopeScaling,
    YarnScaling,
    require_positive,
    require_positive_int,
    yarn_mscale,
)

__all__ = ["DIGITS", "PI", "Llama4Scaling", "LongRopeScaling", "MLAConfig", "RopeConfig", "YarnScaling", "yarn_mscale"]

DIGITS = Context(prec=60)
"""Decimal arithmetic in which rotary frequencies are exact for every purpose of float64."""

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the ``dim`` rope dimensions.

    Args:
        dim: width r of the rotated part (qk_rope_head_dim); even.
        theta: base of the frequencies theta^(-2i/dim).
        interleaved: True pairs (2i, 2i+1) (DeepSeek-V2/V3), False pairs (i, i + dim/2) (GPT-NeoX).
        yarn: YaRN scaling, or None.
        longrope: LongRoPE scaling, or None; not both.
        max_position_embeddings: the model's context; only read by ``YarnScaling.applies == "beyond_original"`` and
            LongRoPE.

    Raises:
        ValueError: odd or non-positive dim, non-positive theta, both scalings, a YaRN ramp that is inverted or, without a
            guard, has no width, or a number of LongRoPE factors other than dim/2.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = True
    yarn: YarnScaling | None = None
    longrope: LongRopeScaling | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        require_positive_int("RopeConfig", dim=self.dim)
        if self.dim % 2:
            raise ValueError(f"RopeConfig: dim (qk_rope_head_dim) must be even, got {self.dim}")
        require_positive("RopeConfig", theta=self.theta)
        if self.theta <= 1:
            raise ValueError(f"RopeConfig: theta must exceed 1, got {self.theta!r}")
        if self.yarn is not None and self.yarn.applies == "beyond_original" and self.max_position_embeddings is None:
            raise ValueError("RopeConfig: yarn.applies='beyond_original' needs max_position_embeddings, got None")
        if self.active_yarn is not None:
            self._check_correction_range(self.active_yarn)
        if self.longrope is not None:
            self._check_longrope(self.longrope)

    def _check_correction_range(self, yarn: YarnScaling) -> None:
        low, high = self.yarn_correction_range()
        if low > high:
            raise ValueError(
                f"RopeConfig: YaRN correction range is inverted (low {low:g} > high {high:g}) for dim={self.dim}, "
                f"theta={self.theta:g}; choose other betas"
            )
        if low == high and yarn.ramp_guard is None:
            raise ValueError(
                f"RopeConfig: YaRN correction range is empty (low == high == {low:g}) for dim={self.dim}, "
                f"theta={self.theta:g}; set ramp_guard (DeepSeek's code uses 0.001) or other betas"
            )

    def _check_longrope(self, longrope: LongRopeScaling) -> None:
        if self.yarn is not None:
            raise ValueError("RopeConfig: yarn and longrope cannot both be given")
        if self.max_position_embeddings is None:
            raise ValueError("RopeConfig: longrope needs max_position_embeddings, got None")
        if len(longrope.short_factor) != self.dim // 2:
            raise ValueError(
                f"RopeConfig: longrope must have dim/2 = {self.dim // 2} factors, got {len(longrope.short_factor)}"
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
            ValueError: the scaling type is not "default", "yarn" or "longrope", or a parameter is unknown or missing.
        """
        scaling = dict(rope_scaling or {})
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        if kind not in ("default", "yarn", "longrope"):
            raise ValueError(
                f"rope_scaling: unknown rope type {kind!r}; known types are 'default', 'yarn' and 'longrope'"
            )
        if kind == "default" and scaling:
            raise ValueError(f"rope_scaling: type 'default' has no parameter {min(scaling)!r}")
        return cls(
            dim=dim,
            theta=float(theta),
            interleaved=interleaved,
            yarn=_yarn(scaling) if kind == "yarn" else None,
            longrope=_longrope(scaling) if kind == "longrope" else None,
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
        """The factor on cos and sin; 1.0 without YaRN and LongRoPE."""
        if self.longrope is not None:
            assert self.max_position_embeddings is not None
            return self.longrope.cos_sin_factor(self.max_position_embeddings)
        return 1.0 if self.active_yarn is None else self.active_yarn.cos_sin_factor

    @property
    def frequency_divisors(self) -> tuple[float, ...] | None:
        """What LongRoPE divides each of the dim/2 frequencies by, or None."""
        if self.longrope is None:
            return None
        assert self.max_position_embeddings is not None
        return self.longrope.divisors(self.max_position_embeddings)

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
        return _yarn_correction_range(self.dim, self.theta, yarn)


@lru_cache(maxsize=256)
def _yarn_correction_range(dim: int, theta: float, yarn: YarnScaling) -> tuple[Decimal, Decimal]:
    with localcontext(DIGITS):

        def pair_index(rotations: float) -> Decimal:
            wavelength = yarn.original_max_position_embeddings / (Decimal(rotations) * 2 * PI)
            return dim * wavelength.ln() / (2 * Decimal(theta).ln())

        low, high = pair_index(yarn.beta_fast), pair_index(yarn.beta_slow)
        if yarn.truncate:
            low, high = Decimal(math.floor(low)), Decimal(math.ceil(high))
        return max(low, Decimal(0)), min(high, Decimal(dim - 1))


def _yarn(entry: dict[str, Any]) -> YarnScaling:
    """A checkpoint's YaRN entry without its type."""
    _require_known("YaRN", entry, YarnScaling)
    return YarnScaling(**{"mscale": None, "mscale_all_dim": None, "ramp_guard": 0.001, **entry})


def _longrope(entry: dict[str, Any]) -> LongRopeScaling:
    """A checkpoint's LongRoPE entry without its type."""
    _require_known("LongRoPE", entry, LongRopeScaling)
    for name in ("short_factor", "long_factor", "original_max_position_embeddings"):
        if entry.get(name) is None:
            raise ValueError(f"rope_scaling: LongRoPE needs {name}")
    lists = {name: tuple(entry[name]) for name in ("short_factor", "long_factor")}
    return LongRopeScaling(**{**entry, **lists})


def _require_known(scaling: str, entry: dict[str, Any], cls: type[YarnScaling] | type[LongRopeScaling]) -> None:
    unknown = sorted(set(entry) - set(cls.__dataclass_fields__))
    if unknown:
        raise ValueError(f"rope_scaling: unknown {scaling} parameter {unknown[0]!r}")


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
        mla_scale_q_lora, mla_scale_kv_lora: whether the normalised latents of query and keys are multiplied by
            sqrt(e / their rank) (LongCat-Flash).
        k_pe_norm: whether k_pe has an RMSNorm of its own before it is rotated, with latent_norm_eps (dots3).
        llama_4_scaling: temperature by position (Mistral-Large-3), or None.
        output_gate: what the sigmoid of g_proj multiplies before o_proj: each "head" (Ling-3.0, dots3) or each "element"
            (Kimi-K3, Hy4) of the result of attention; None where there is no gate. "query" gates each element, too: queries and
            gates come from one q_gate_proj, which takes the query latent after its norm and before it (A.X-K2).
        attention_sink: whether each head has a learned logit that joins the sum of its softmax (Hy4).
        softmax_scale: overrides the default scale.

    Raises:
        ValueError: a dimension is not a positive integer, rope.dim differs from qk_rope_head_dim, mla_scale_q_lora is set
            without query compression, k_pe_norm without rope dims, output_gate is unknown, or it is "query" without query
            compression or with mla_scale_q_lora.
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
    mla_scale_q_lora: bool = False
    mla_scale_kv_lora: bool = False
    k_pe_norm: bool = False
    llama_4_scaling: Llama4Scaling | None = None
    output_gate: Literal["head", "element", "query"] | None = None
    attention_sink: bool = False
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        require_positive_int(
            "MLAConfig",
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        if self.q_lora_rank is not None:
            require_positive_int("MLAConfig", q_lora_rank=self.q_lora_rank)
        if self.qk_rope_head_dim != 0:
            require_positive_int("MLAConfig", qk_rope_head_dim=self.qk_rope_head_dim)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"MLAConfig: qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.rope is not None and self.rope.dim != self.qk_rope_head_dim:
            raise ValueError(
                f"MLAConfig: rope.dim must equal qk_rope_head_dim, got {self.rope.dim} and {self.qk_rope_head_dim}"
            )
        require_positive("MLAConfig", latent_norm_eps=self.latent_norm_eps)
        if self.mla_scale_q_lora and self.q_lora_rank is None:
            raise ValueError("MLAConfig: mla_scale_q_lora needs a q_lora_rank, got None")
        if self.k_pe_norm and self.qk_rope_head_dim == 0:
            raise ValueError("MLAConfig: k_pe_norm needs a k_pe, got qk_rope_head_dim 0")
        if self.output_gate not in (None, "head", "element", "query"):
            raise ValueError(
                f"MLAConfig: output_gate must be 'head', 'element', 'query' or None, got {self.output_gate!r}"
            )
        if self.output_gate == "query" and (self.q_lora_rank is None or self.mla_scale_q_lora):
            raise ValueError("MLAConfig: output_gate 'query' needs a q_lora_rank, and no mla_scale_q_lora")
        if self.softmax_scale is not None:
            require_positive("MLAConfig", softmax_scale=self.softmax_scale)

    @property
    def qk_head_dim(self) -> int:
        """n + r."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """c + r: elements of one cache row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def q_lora_scale(self) -> float:
        """The factor on the query latent: sqrt(e / q_lora_rank) with ``mla_scale_q_lora``, else 1."""
        if not self.mla_scale_q_lora:
            return 1.0
        assert self.q_lora_rank is not None
        return math.sqrt(self.hidden_size / self.q_lora_rank)

    @property
    def kv_lora_scale(self) -> float:
        """The factor on the cached latent: sqrt(e / kv_lora_rank) with ``mla_scale_kv_lora``, else 1."""
        return math.sqrt(self.hidden_size / self.kv_lora_rank) if self.mla_scale_kv_lora else 1.0

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

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> MLAConfig:
        """The configuration that a checkpoint's config.json states: its path, its text, or what it parses to.

        Read are transformers' names, with rope_scaling or rope_parameters, a nested text_config, and the names of DeepSeek's
        own inference configuration. A q_lora_rank of 0 or null is no query compression.

        Raises:
            ValueError: unreadable, no MLA, an unknown model_type or key of the rotary embedding, values that contradict each
                other, or an option that this class cannot express (the message names it).
        """
        from mla_spec.reference.checkpoint import checkpoint_model

        return checkpoint_model(source).mla_config()
