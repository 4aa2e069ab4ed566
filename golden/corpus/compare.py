"""The float64 reference held against the expected arrays of a case.

The allowance is what the reference itself states: the term of its error bound for its own float64 arithmetic, plus the one
rounding of the expected value. Results that float64 gives exactly must have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_spec.golden.cases.case import Values
from mla_spec.golden.corpus import (
    computed,
    computed_gradients,
    computed_sparse,
    computed_weights,
)
from mla_spec.golden.corpus.computed import Computed
from mla_spec.golden.corpus.error import CorpusError
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array
from mla_spec.text.terminal import one_line, shown

_MODULES = (computed, computed_sparse, computed_gradients, computed_weights)

COMPUTED = {name: function for module in _MODULES for name, function in module.COMPUTED.items()}
"""What the reference computes from the inputs and parameters of a case, by operation."""

_FORMAT = format_of("float64")


@dataclass(frozen=True)
class Comparison:
    """The largest error of a case relative to its allowance, and the array that has it."""

    ratio: float
    name: str


def compare(
    operation: str, inputs: Values, parameters: Mapping[str, Any], want: Values, exact: list[str]
) -> Comparison:
    """The reference's results of one case against the expected arrays ``want``, of which ``exact`` must agree in all bits.

    Raises:
        CorpusError: a result lies outside its allowance, or the case lacks something that its operation needs.
    """
    if operation not in COMPUTED:
        raise CorpusError(f"unknown operation {shown(operation)}; expected one of {', '.join(COMPUTED)}")
    try:
        results = list(COMPUTED[operation](inputs, parameters))
    except KeyError as error:
        raise CorpusError(f"{operation} needs {error}, which the case lacks") from error
    except Exception as error:  # whatever the arrays and parameters of a damaged case lead to
        raise CorpusError(f"{operation} cannot be computed from this case: {one_line(error, 400)}") from error
    if {result.name for result in results} != set(want):
        names = sorted({result.name for result in results})
        raise CorpusError(f"{operation} gives {', '.join(names)}; the case expects {', '.join(sorted(want))}")
    return max((_one(result, want[result.name], result.name in exact) for result in results), key=lambda c: c.ratio)


def _one(got: Computed, want: Array, exact: bool) -> Comparison:
    if got.value.shape != want.shape:
        raise CorpusError(f"{got.name} has shape {list(want.shape)}; the reference's is {list(got.value.shape)}")
    rounding = _FORMAT.unit_roundoff * np.abs(want) + _FORMAT.smallest_subnormal / 2
    allowance = np.zeros(want.shape) if exact else got.error + rounding
    same = got.value == want  # infinities too
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(same, 0.0, np.abs(got.value - want) / allowance)
    ratio = np.where(np.isnan(ratio) | (np.isinf(want) & ~same), np.inf, ratio)
    if ratio.size == 0:
        return Comparison(0.0, got.name)
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    if ratio[index] > 1:
        raise CorpusError(
            f"{got.name}{list(index)} is {float(want[index])!r}, but the reference gives {float(got.value[index])!r}: "
            f"{abs(got.value[index] - want[index]):.3g} apart, allowed {allowance[index]:.3g}"
        )
    return Comparison(float(ratio[index]), got.name)
