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
    """How a dot product is formed: what becomes of its operands, and how the products are summed.

    Args:
        format: of the running sum.
        order: "sequential" holds for every order of summation, so it is the safe default; "blocked" sums ``block``
            products first and the partial sums then; "tensor-core" aligns ``block`` products to ``fraction_bits``.
        operands: format to which both operands are rounded before they are multiplied, "tfloat32" or "bfloat16"; None
            where they are multiplied as they are.
        operand_parts: numbers of that format whose sum stands for an operand: 1; 2 where three products make one
            ("bf16x3", "tf32x3"); 3 where six do ("bf16x6").
        operand_rounding: of the operands, and of what each part leaves to the next.

    Raises:
        ValueError: an unknown format or order, operands of less range than float32, or a number below 1.
    """

    format: str = "float32"
    order: Literal["sequential", "blocked", "tensor-core"] = "sequential"
    block: Count = 1
    fraction_bits: Count = 25
    operands: str | None = None
    operand_parts: Count = 1
    operand_rounding: Literal["nearest", "truncate"] = "nearest"

    def __post_init__(self) -> None:
        require_fields(self)
        format_of(self.format)
        if self.operands is not None and format_of(self.operands).min_exponent > -126:
            raise ValueError(f"Accumulator: operands in {self.operands} overflow where those in float32 do not")

    @property
    def operand_roundoff(self) -> float:
        """What a part leaves of an operand, relatively; 0 where operands are multiplied as they are."""
        if self.operands is None:
            return 0.0
        return format_of(self.operands).unit_roundoff * (2 if self.operand_rounding == "truncate" else 1)

    @property
    def operand_error(self) -> float:
        """Error of a product from rounding its operands, relatively.

        With parts a_i and b_j of at most (1 + u) u^i |a| and the rest r_i of at most u^i |a|, the products of parts with
        i + j < p miss Σ_i a_i r_(p−i) + r_p b.
        """
        u, p = self.operand_roundoff, self.operand_parts
        return u**p * (p * (1 + u) + 1)

    def relative_error(self, n: int) -> float:
        """Γ: error of a dot product of n products, relative to the sum of their magnitudes.

        Higham, *Accuracy and Stability of Numerical Algorithms*, section 4.2; Blanchard et al. 2020 (block FMA).
        """
        u, p = self.operand_roundoff, self.operand_parts
        size = (1 + u) ** 2 * sum((k + 1) * u**k for k in range(p))  # of the products of parts
        return self.operand_error + self.sum_error(n * p * (p + 1) // 2 if u else n) * size

    def sum_error(self, n: int) -> float:
        """Error of a sum of n numbers, relative to the sum of their magnitudes."""
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
        query: format to which q is rounded before the product; None where it is used as stored.
        query_scale: what shares one scale max|q| / (largest number of that format), by which q is divided first: all of
            q ("tensor"), the heads of a token ("token"), or each head of a token ("head"); "none" where there is no scale.
        query_times_scale: whether softmax_scale is multiplied into q before that rounding.
        operand_roundings: how often q and k together are rounded to the accumulator's format before the product, beyond
            being read as stored (4 where both are multiplied by the root of the scale).
        score_format, score_roundings: format in which scores are stored before the softmax, and how many times they
            are rounded to it (1 after the product; 2 if again after scaling).
        softmax: format of the softmax arithmetic: exp, row sum, division.
        exp_error: relative error of exp, in units of the softmax format's roundoff.
        maximum: format to which the running maximum is rounded before it is subtracted; None where it is a score itself.
        tile: keys per step of an online softmax, which rescales at each step; None for a softmax over all keys.
        probabilities: format of the weights P that multiply V.
        probabilities_scale: power of two by which the weights are multiplied before they are rounded, and which the
            output is divided by.
        row_sum: whether the row sum adds the weights before ("unrounded") or after ("rounded") that rounding;
            "normalised" where it adds them before and they may be divided by it before they are rounded; "lse" where
            the weights are exp(s − lse), which nothing divides.
        value: accumulation of P·V.
        splits: parts into which the keys may be split and which are then merged by their LSEs, all at once;
            ``split_format`` stores the parts.
        merge_shares: whether the shares exp(lse_part − lse) of merged parts are used as they are ("unnormalised") or
            divided by their sum ("normalised"); or the sigmoid of a difference of LSEs ("sigmoid"), by which parts are
            merged one after the other: out − sigmoid(l' − l)(out − out'), lse − logsigmoid(l − l').
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
    query: str | None = None
    query_scale: Literal["none", "tensor", "token", "head"] = "none"
    query_times_scale: bool = False
    operand_roundings: Size = 0
    score_format: str = "float32"
    score_roundings: Size = 1
    softmax: str = "float32"
    exp_error: Annotated[float, Least(0)] = 4.0
    maximum: str | None = None
    tile: Count | None = None
    probabilities: str = "float32"
    probabilities_scale: float = 1.0
    row_sum: Literal["unrounded", "rounded", "normalised", "lse"] = "unrounded"
    value: Accumulator = field(default_factory=Accumulator)
    splits: Size = 1
    merge_every: Count | None = None
    merge_shares: Literal["unnormalised", "normalised", "sigmoid"] = "unnormalised"
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
        for optional in (self.cache_dequantised, self.query, self.maximum):
            if optional is not None:
                format_of(optional)
        if self.query is None and (self.query_scale != "none" or self.query_times_scale):
            raise ValueError(
                "Profile: query_scale and query_times_scale say how q is rounded; name its format in query"
            )
        largest = format_of(self.probabilities).max_finite
        if math.frexp(self.probabilities_scale)[0] != 0.5 or self.probabilities_scale > largest:
            raise ValueError(
                f"Profile: probabilities_scale must be a power of two up to {largest:g}, got {self.probabilities_scale!r}"
            )

    @property
    def coarse(self) -> bool:
        """Whether rounding P may move an output by more than 5 %, so that a worst case of it says nothing."""
        return format_of(self.probabilities).unit_roundoff > 0.05

    @property
    def averages_exactly(self) -> bool:
        """Whether keys of equal weight give exactly their mean, where they are as many as a power of two and in one part."""
        ring = self.merge_shares == "sigmoid" and self.merges(1) > 0
        whole = self.splits <= 1 and self.row_sum != "lse" and self.maximum is None
        return self.output_rounding == "nearest" and whole and not ring

    def merges(self, keys: int) -> int:
        """Merges by LSE that a part of ``keys`` keys passes through."""
        of_splits = self.splits - 1 if self.merge_shares == "sigmoid" else int(self.splits > 1)
        return max(of_splits, 0) + (math.ceil(keys / self.merge_every) if self.merge_every else 0)

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

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that differ from the default of its dtype."""
        default = asdict(Profile.default(self.dtype))
        return {k: _stated(v) for k, v in asdict(self).items() if default[k] != v}

    def describe(self) -> str:
        """The profile in one line: the fields that differ from the default of its dtype."""
        changed = [f"{k}={v}" for k, v in self.changed.items()]
        return f"{self.dtype} default" + (", " + ", ".join(changed) if changed else "")


def _stated(value: Any) -> Any:
    """A field as it is described: of an accumulator that rounds no operands, nothing about them."""
    if isinstance(value, dict) and value.get("operands", "") is None:
        return {name: of for name, of in value.items() if not name.startswith("operand")}
    return value
