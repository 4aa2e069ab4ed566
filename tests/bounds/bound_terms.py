"""What bounds written out in plain Python floats share: roundoffs, γ, half an ulp, and the comparison term by term.

A bound is written out from docs/bounds.md for one row, element by element, with the profile and the exact result as given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.reference.formats import FORMATS

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
U64 = UNIT_ROUNDOFF["float64"]


def gamma(n: int, u: float) -> float:
    """γ_n of docs/bounds.md."""
    return n * u / (1 - n * u)


def half_ulp(size: float, name: str) -> float:
    """Half the distance of neighbours in format ``name`` at ``size``, and among subnormals."""
    least = FORMATS[name].min_exponent
    exponent = max(math.frexp(size)[1] - 1, least) if size > 0 else least
    return math.ldexp(2.0 ** -FORMATS[name].precision, exponent)


def assert_terms(bound: ErrorBound, index: Any, want: Mapping[str, Any]) -> None:
    """The contributions to ``bound`` at ``index`` are those written out, to the rounding of float64."""
    assert bound.terms.keys() == want.keys()
    for name, term in want.items():
        np.testing.assert_allclose(bound.terms[name][index], term, rtol=1e-12, atol=0, err_msg=f"{name} at {index}")
