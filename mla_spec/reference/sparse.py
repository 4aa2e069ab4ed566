"""Sparse attention (DSA): the lightning indexer, its selection, and attention over the selected keys.

Source: DeepSeek-V3.2 technical report, section 2.1, equations 1 and 2; conventions of FlashMLA's sparse kernels
(flash_mla/flash_mla_interface.py): an index of -1, or not below the number of keys, selects nothing.
"""

from __future__ import annotations

import numpy as np

from mla_spec.reference.typing import Array, IntArray


def indexer_logits(q: Array, k: Array, weights: Array) -> Array:
    """I_st = Σ_h w_sh · relu(q_sh · k_t), equation 1.

    Args:
        q: [..., s, h, d]. k: [..., t, d]. weights: [..., s, h], with every scale factor already in them.

    Returns:
        [..., s, t].
    """
    scores = np.einsum("...shd,...td->...sht", q, k)
    logits: Array = np.einsum("...sh,...sht->...st", weights, np.maximum(scores, 0.0))
    return logits


def select_top_k(logits: Array, k: int, visible: IntArray) -> IntArray:
    """The indices of the k largest logits of each row, equation 2: larger first, of equal ones the smaller index first.

    Args:
        logits: [..., s, t].
        visible: [..., s]; row i chooses among keys 0 .. visible - 1.

    Returns:
        [..., s, k], -1 where fewer than k keys are visible.
    """
    shown = np.where(np.arange(logits.shape[-1]) < visible[..., None], logits, -np.inf)
    order = np.argsort(-shown, axis=-1, kind="stable")[..., :k]
    missing = k - order.shape[-1]
    order = np.pad(order, [*[(0, 0)] * (order.ndim - 1), (0, missing)], constant_values=-1)
    indices: IntArray = np.where(np.arange(k) < visible[..., None], order, -1)
    return indices


def selected_rows(kv: Array, indices: IntArray, topk_length: IntArray | None = None) -> tuple[Array, IntArray]:
    """The rows of kv that each row of ``indices`` selects, first, and how many they are.

    Arguments are those of ``sparse_attention``.

    Returns:
        (rows [..., s, k, d], count [..., s]); rows from ``count`` on are 0, whatever rows of kv that nothing selects hold.
    """
    chosen, count = selected_indices(kv, indices, topk_length)
    rows = np.take_along_axis(kv[..., None, :, :], chosen[..., None], axis=-2)  # [..., s, k, d]
    selected = np.arange(chosen.shape[-1]) < count[..., None]  # [..., s, k]
    return np.where(selected[..., None], rows, 0.0), count


def selected_indices(kv: Array, indices: IntArray, topk_length: IntArray | None = None) -> tuple[IntArray, IntArray]:
    """The entries of each row of ``indices`` that select a row of kv, first, and how many they are.

    Returns:
        (chosen [..., s, k], count [..., s]); entries from ``count`` on are 0 and mean nothing.
    """
    if topk_length is not None:
        length = np.expand_dims(topk_length, tuple(range(topk_length.ndim, indices.ndim)))  # [..., s or 1, 1]
        indices = np.where(np.arange(indices.shape[-1]) < length, indices, -1)
    valid = (indices >= 0) & (indices < kv.shape[-2])  # [..., s, k]
    order = np.argsort(~valid, axis=-1, kind="stable")  # the valid ones first
    return np.take_along_axis(np.where(valid, indices, 0), order, axis=-1), valid.sum(axis=-1)
