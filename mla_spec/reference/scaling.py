"""How models reach beyond the context of their pre-training: YaRN, LongRoPE and Mistral's temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mla_spec.reference.typing import Array, IntArray


def require_positive_int(owner: str, **values: int) -> None:
    """Raise ValueError, which names the class ``owner``, unless every value is a positive int."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")


def require_positive(owner: str, **values: float) -> None:
    """Raise ValueError, which names the class ``owner``, unless every value is a positive finite number."""
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
        require_positive("YarnScaling", factor=self.factor, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        require_positive_int("YarnScaling", original_max_position_embeddings=self.original_max_position_embeddings)
        optional = {name: getattr(self, name) for name in ("attention_factor", "softmax_mscale", "ramp_guard")}
        require_positive("YarnScaling", **{name: value for name, value in optional.items() if value is not None})
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
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753) as MiniCPM3 uses it: each frequency is divided by a factor of its own.

    The long factors are in effect where the model's max_position_embeddings exceeds the original context, the short ones
    otherwise; that is vLLM's rule. transformers chooses anew in each call, by the largest position in it, which leaves
    cached keys rotated by the other factors; the two agree as long as a sequence stays on one side.

    Args:
        short_factor, long_factor: r/2 numbers each, for pair i in element i.
        original_max_position_embeddings: context length of the pre-training, in tokens.
        factor: context extension; None is max_position_embeddings over the original context.
        attention_factor: factor on cos and sin; None is sqrt(1 + ln(factor) / ln(original context)), and 1 for
            factor ≤ 1 (LongRoPE, section 3.4).

    Raises:
        ValueError: a factor list is no tuple of positive numbers, their lengths differ, or a parameter is out of range.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if not isinstance(values, tuple):
                raise ValueError(f"LongRopeScaling: {name} must be a tuple of numbers, got {values!r}")
            require_positive("LongRopeScaling", **{f"{name}[{i}]": value for i, value in enumerate(values)})
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                "LongRopeScaling: short_factor and long_factor must have the same length, "
                f"got {len(self.short_factor)} and {len(self.long_factor)}"
            )
        require_positive_int("LongRopeScaling", original_max_position_embeddings=self.original_max_position_embeddings)
        if self.original_max_position_embeddings == 1:
            raise ValueError("LongRopeScaling: original_max_position_embeddings must exceed 1, got 1")
        optional = {name: getattr(self, name) for name in ("factor", "attention_factor")}
        require_positive("LongRopeScaling", **{name: value for name, value in optional.items() if value is not None})

    def divisors(self, max_position_embeddings: int) -> tuple[float, ...]:
        """The factors in effect in a model of this context."""
        beyond = max_position_embeddings > self.original_max_position_embeddings
        return self.long_factor if beyond else self.short_factor

    def cos_sin_factor(self, max_position_embeddings: int) -> float:
        """The factor on cos and sin in a model of this context."""
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        factor = max_position_embeddings / original if self.factor is None else self.factor
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


@dataclass(frozen=True, kw_only=True)
class Llama4Scaling:
    """Mistral-Large-3's ``llama_4_scaling``: queries are multiplied by 1 + beta · ln(1 + floor(position / L)).

    It is a temperature that falls with the position, first used in Llama 4; L is the original context, so nothing changes
    within it. Sources: vLLM models/AXK1.py, _get_llama_4_scaling; transformers models/mistral4.

    Raises:
        ValueError: beta or the context length is not positive.
    """

    beta: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require_positive("Llama4Scaling", beta=self.beta)
        require_positive_int("Llama4Scaling", original_max_position_embeddings=self.original_max_position_embeddings)

    def factor(self, positions: IntArray) -> Array:
        """The factor of the query at each position, of the same shape; exactly 1 within the original context."""
        periods = np.asarray(positions) // self.original_max_position_embeddings
        factor: Array = 1 + self.beta * np.log1p(periods.astype(np.float64))
        return factor
