"""The numeric format of each stage of an implementation, from which its error bound follows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from mla_spec.reference.formats import format_of
from mla_spec.text.typed import Count, Least, Size, require_fields


def gamma(n: float, u: float) -> float:
    """γ_n = n·u / (1 − n·u): error of n roundings in a row (Higham, ASNA, lemma 3.1); inf when n·u ≥ 1."""
    return n * u / (1 - n * u) if n * u < 1 else math.inf


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """How a dot product is summed.

    Args:
        format: of the running sum.
        order: "sequential" holds for every order of summation, so it is the safe default; "blocked" sums ``block``
            products first and the partial sums then; "tensor-core" aligns ``block`` products to ``fraction_bits``.
    """

    format: str = "float32"
    order: Literal["sequential", "blocked", "tensor-core"] = "sequential"
    block: Count = 1
    fraction_bits: Count = 25

    def __post_init__(self) -> None:
        require_fields(self)
        format_of(self.format)

    def relative_error(self, n: int) -> float:
        """Γ: error of a sum of n products, relative to the sum of their magnitudes.

        Higham, *Accuracy and Stability of Numerical Algorithms*, section 4.2; Blanchard et al. 2020 (block FMA).
        """
        u = format_of(self.format).unit_roundoff
        if self.order == "sequential":
            return gamma(n, u)
        blocks = math.ceil(n / self.block)
        if self.order == "blocked":
            return gamma(self.block + blocks, u)
        return blocks * (4 * (self.block + 1) * 2.0**-self.fraction_bits + 2.0**-23)


@dataclass(frozen=True, kw_only=True)
class RopeProfile:
    """Formats of the rotary embedding: frequency and angle, cos/sin table, and the rotation itself."""

    frequency: str = "float32"
    angle: str = "float32"
    table: str = "float32"
    rotation: str = "float32"

    def __post_init__(self) -> None:
        require_fields(self)
        for name in (self.frequency, self.angle, self.table, self.rotation):
            format_of(name)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a subject declares about its arithmetic. It cannot declare a tolerance.

    Args:
        dtype: of inputs and of every intermediate of a layer.
        score: accumulation of q·k.
        operand_roundings: how often q and k together are rounded to the accumulator's format before the product, beyond
            being read as stored (4 where both are multiplied by the root of the scale).
        score_format, score_roundings: format in which scores are stored before the softmax, and how many times they
            are rounded to it (1 after the product; 2 if again after scaling).
        softmax: format of the softmax arithmetic: exp, row sum, division.
        exp_error: relative error of exp, in units of the softmax format's roundoff.
        tile: keys per step of an online softmax, which rescales at each step; None for a softmax over all keys.
        probabilities: format of the weights P that multiply V.
        row_sum: whether the row sum adds the weights before ("unrounded") or after ("rounded") that rounding;
            "normalised" where it adds them before and they may be divided by it before they are rounded.
        value: accumulation of P·V.
        splits: parts into which the keys may be split and which are then merged by their LSEs, all at once;
            ``split_format`` stores the parts.
        merge_shares: whether the shares exp(lse_part − lse) of merged parts are used as they are ("unnormalised") or
            divided by their sum ("normalised").
        merge_every: keys after which the running result is merged by its LSE with the next part; None if never.
        output, output_rounding: format and rounding of the output.
        lse: format of the LSE.
        form: "explicit" or "absorbed": which form a layer computes.
        linear, norm: accumulation of a layer's projections, and the format of RMSNorm's arithmetic.
        rope: formats of the rotary embedding.
        cache_dequantised: format to which the rows of a quantised cache are rounded before they are used; None where
            code times scale stays exact, or is rounded to the softmax's format only.
        batch_invariant: a sequence gives the same bits alone and in any batch.
        deterministic: the same call gives the same bits every time.

    Raises:
        ValueError: an unknown format or option, or a value of another type.
    """

    dtype: str
    score: Accumulator = field(default_factory=Accumulator)
    operand_roundings: Size = 0
    score_format: str = "float32"
    score_roundings: Size = 1
    softmax: str = "float32"
    exp_error: Annotated[float, Least(0)] = 4.0
    tile: Count | None = None
    probabilities: str = "float32"
    row_sum: Literal["unrounded", "rounded", "normalised"] = "unrounded"
    value: Accumulator = field(default_factory=Accumulator)
    splits: Size = 1
    merge_every: Count | None = None
    merge_shares: Literal["unnormalised", "normalised"] = "unnormalised"
    split_format: str = "float32"
    output: str = ""
    output_rounding: Literal["nearest", "truncate"] = "nearest"
    lse: str = "float32"
    form: Literal["explicit", "absorbed"] = "explicit"
    linear: Accumulator = field(default_factory=Accumulator)
    norm: str = "float32"
    rope: RopeProfile = field(default_factory=RopeProfile)
    cache_dequantised: str | None = None
    batch_invariant: bool = False
    deterministic: bool = True

    def __post_init__(self) -> None:
        require_fields(self)
        object.__setattr__(self, "output", self.output or self.dtype)
        for name in ("dtype", "score_format", "softmax", "probabilities", "split_format", "output", "lse", "norm"):
            format_of(getattr(self, name))
        if self.cache_dequantised is not None:
            format_of(self.cache_dequantised)

    def merges(self, keys: int) -> int:
        """Merges by LSE that a part of ``keys`` keys passes through."""
        return int(self.splits > 1) + (math.ceil(keys / self.merge_every) if self.merge_every else 0)

    @classmethod
    def default(cls, dtype: str, **changes: Any) -> Profile:
        """The profile of a well-made kernel for ``dtype``.

        float32 arithmetic with P rounded to the input's format before P·V and the row sum of unrounded P, output in the
        input's format, LSE in float32; everything in float64 for float64 inputs. ``changes`` replace single fields.
        """
        if dtype == "float64":
            wide = Accumulator(format="float64")
            base = cls(
                dtype=dtype,
                score=wide,
                score_format=dtype,
                softmax=dtype,
                probabilities=dtype,
                value=wide,
                split_format=dtype,
                lse=dtype,
                linear=wide,
                norm=dtype,
                rope=RopeProfile(frequency=dtype, angle=dtype, table=dtype, rotation=dtype),
            )
        else:
            base = cls(dtype=dtype, probabilities=dtype)
        return replace(base, **changes)

    def describe(self) -> str:
        """The profile in one line: the fields that differ from the default of its dtype."""
        default = asdict(Profile.default(self.dtype))
        changed = [f"{k}={v}" for k, v in asdict(self).items() if default[k] != v]
        return f"{self.dtype} default" + (", " + ", ".join(changed) if changed else "")
