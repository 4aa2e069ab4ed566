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


def merge_backward(outs: Array, lses: Array, out_grad: Array, lse_grad: Array | None = None) -> tuple[Array, Array]:
    """Gradients of a loss with respect to the outs and lses of ``merge``, whose arguments and errors these are.

    With p_i = exp(L_i − lse), dp_i = Σ_d dO_d O_id and D = Σ_i p_i dp_i = Σ_d dO_d out_d,

        dO_i = p_i dO,    dL_i = p_i (dp_i − D + dlse).

    Args:
        out_grad: of the loss with respect to out, [..., s, h, dv].
        lse_grad: of the loss with respect to the LSE, [..., h, s]; None where it does not depend on it.

    Returns:
        (outs_grad [parts, ..., s, h, dv], lses_grad [parts, ..., h, s]), both 0 in parts without keys.
    """
    p, _ = merge_weights(outs, lses)  # [parts, ..., h, s]
    do = np.asarray(out_grad)
    dp = part_products(do, np.where(part_columns(p) > 0, outs, 0.0))  # [parts, ..., h, s]
    mean = (p * dp).sum(axis=0)  # D, [..., h, s]
    dlse = np.zeros(mean.shape) if lse_grad is None else lse_grad
    return part_columns(p) * do, p * (dp - mean + dlse)


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


def part_products(out_grad: Array, outs: Array) -> Array:
    """Σ_d dO_d O_id of out_grad [..., s, h, dv] and outs [parts, ..., s, h, dv]: [parts, ..., h, s]."""
    return np.swapaxes((out_grad * outs).sum(axis=-1), -1, -2)
