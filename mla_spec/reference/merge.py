"""Split-KV merge: parts of one attention over disjoint keys, joined by their log-sum-exps.

With L_i and O_i the LSE and the output of part i, softmax over all keys gives

    lse = log Σ_i exp(L_i),    out = Σ_i exp(L_i − lse) O_i

Milakov and Gimelshein (arXiv 1805.02867), section 3.1, for several parts at once.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mla_spec.reference.typing import Array

X = TypeVar("X", bound=np.generic)


def merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """out and LSE over the keys of all parts.

    Args:
        outs: [parts, ..., s, h, dv]. Outputs of parts without keys are not read.
        lses: [parts, ..., h, s], natural logarithms; -inf for a part without keys.

    Returns:
        (out [..., s, h, dv], lse [..., h, s]). A row whose parts are all empty, or that has no parts, gives 0 and -inf.
        Any finite LSEs are handled, however far apart.

    Raises:
        ValueError: shapes do not fit, or an LSE is NaN or +inf.
    """
    weights, lse = merge_weights(outs, lses)  # [parts, ..., h, s], [..., h, s]
    share = part_columns(weights)  # [parts, ..., s, h, 1]
    return (share * np.where(share > 0, outs, 0.0)).sum(axis=0), lse


def merge_weights(outs: Array, lses: Array) -> tuple[Array, Array]:
    """(exp(L_i − lse) [parts, ..., h, s], lse [..., h, s]); arguments and errors are those of ``merge``."""
    if outs.ndim < 4 or lses.shape != (*outs.shape[:-3], outs.shape[-2], outs.shape[-3]):
        raise ValueError(
            f"outs [parts, ..., s, h, dv] and lses [parts, ..., h, s] must fit, got {outs.shape} and {lses.shape}"
        )
    if not (lses < np.inf).all():
        raise ValueError("lses must be finite or -inf")
    largest = lses.max(axis=0, initial=-np.inf)  # [..., h, s]
    empty = np.isneginf(largest)
    shift = np.where(empty, 0.0, largest)
    weights = np.exp(lses - shift)  # [parts, ..., h, s]
    total = np.where(empty, 1.0, weights.sum(axis=0))  # [..., h, s]
    return weights / total, np.where(empty, -np.inf, shift + np.log(total))


def part_columns(x: NDArray[X]) -> NDArray[X]:
    """[..., h, s] -> [..., s, h, 1]: one number per row of outputs."""
    return np.swapaxes(x, -1, -2)[..., None]
