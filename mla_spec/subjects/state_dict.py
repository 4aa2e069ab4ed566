"""A layer's weights from a checkpoint's state dict, exactly as stored.

Published checkpoints name them ``model.layers.3.self_attn.q_a_proj.weight`` (transformers), DeepSeek's own code
``layers.3.attn.wq_a.weight``. Of FP8 weights the scale of each block lies beside them, as ``weight_scale_inv`` or ``scale``;
``mla_spec.reference.block_scales`` says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch

from mla_spec.reference.block_scales import CODE, BlockSize, dequantise_weight
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import check_weights, weight_shapes
from mla_spec.reference.typing import Array

OWN_NAMES: Final = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}
"""Names of DeepSeek's inference code (DeepSeek-V3 repository, inference/model.py, class MLA), and the checkpoints' for the same."""

NAMES: Final = frozenset(OWN_NAMES.values())
"""What all layers of MLA have, by which a layer is found."""

GATE: Final = "gate_proj"
"""Hy4's name of g_proj; beside attention, an MLP has one too."""

BESIDE: Final = ("indexer.", "rotary_emb.")
"""Modules beside the weights, which are no weights of MLA."""

SCALES: Final = ("weight_scale_inv", "scale")

State = Mapping[str, torch.Tensor]


def layer_weights(
    state: State, config: MLAConfig, *, prefix: str | None = None, block_size: BlockSize = (128, 128)
) -> dict[str, Array]:
    """The weights of one layer under the names and shapes of ``weight_shapes``.

    Args:
        state: tensors of any floating dtype under a checkpoint's names; of several layers where ``prefix`` chooses one.
        prefix: what stands before the weights' own names, e.g. "model.layers.3.self_attn."; None where all weights of
            attention in ``state`` have the same.
        block_size: rows and columns of a block of FP8 weights, ``quantization_config.weight_block_size`` in a config.json.

    Returns:
        name to float64 [out, in], or [width] of a norm; no value is rounded.

    Raises:
        ValueError: no layer or several, a bias or another weight that MLA has not, a name stated twice, FP8 without scales or
            scales without FP8, a dtype that is not floating, or a missing weight or wrong shape.
    """
    prefix = _only_prefix(state) if prefix is None else prefix
    stored: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    names = NAMES | weight_shapes(config).keys()
    for key, name, kind in _parts(state, prefix):
        known, into = OWN_NAMES.get(name, name), stored if kind == "weight" else scales
        if name == GATE and config.output_gate is not None:
            known = "g_proj"
        if known not in names or kind not in ("weight", *SCALES):
            raise ValueError(f"weights: {key!r} is no weight of MLA; expected the names of weight_shapes")
        if known in into:
            raise ValueError(f"weights: {known} is stated twice, the second time as {key!r}")
        into[known] = state[key]
    for name in sorted(set(scales) - set(stored)):
        raise ValueError(f"weights: {name} has scales but no weight")
    weights = {name: _exact(name, weight, scales.get(name), block_size) for name, weight in stored.items()}
    check_weights(weights, config)
    return weights


def _only_prefix(state: State) -> str:
    """What stands before the names of the only layer in ``state``."""
    found = {prefix for prefix, name, _ in map(_split, state) if OWN_NAMES.get(name, name) in NAMES}
    if len(found) != 1:
        some = ", ".join(map(repr, sorted(found)[:2])) + (", ..." if len(found) > 2 else "")
        what = f"{len(found)} layers, of {some}; name one by prefix" if found else "no weight of MLA"
        raise ValueError(f"weights: the state dict has {what}")
    return found.pop()


def _parts(state: State, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(key, name, "weight" or another suffix) of what lies below ``prefix``."""
    below = [key for key in state if key.startswith(prefix)]
    if not below:
        raise ValueError(f"weights: no key begins with {prefix!r}")
    for key in below:
        if not key[len(prefix) :].startswith(BESIDE):
            if key == f"{prefix}sinks":
                yield key, "sinks", "weight"
                continue
            before, name, kind = _split(key)
            yield key, before[len(prefix) :] + name, kind


def _split(key: str) -> tuple[str, str, str]:
    """("model.layers.3.self_attn.", "q_a_proj", "weight"); a name without suffix is a weight."""
    path, dot, last = key.rpartition(".")
    if OWN_NAMES.get(last, last) in NAMES:
        return path + dot, last, "weight"
    before, dot, name = path.rpartition(".")
    return before + dot, name, last


def _exact(name: str, weight: torch.Tensor, scales: torch.Tensor | None, block_size: BlockSize) -> Array:
    """The numbers that are stored, times the scales of their blocks."""
    if not weight.is_floating_point():
        raise ValueError(f"weights: {name} must be of a floating dtype, got {weight.dtype}")
    quantized = weight.dtype == getattr(torch, CODE)
    if quantized != (scales is not None):
        beside = "but has no scales beside it" if quantized else "but has scales; expected float8_e4m3fn"
        raise ValueError(f"weights: {name} is {str(weight.dtype).removeprefix('torch.')} {beside}")
    values: Array = weight.detach().cpu().to(torch.float64).numpy()
    if scales is None:
        return values
    if values.ndim != 2:
        raise ValueError(f"weights: {name} in FP8 must be a matrix, got shape {tuple(values.shape)}")
    try:
        return dequantise_weight(values, scales.detach().cpu().to(torch.float64).numpy(), block_size)
    except ValueError as error:
        raise ValueError(f"weights: {name}: {error}") from error
