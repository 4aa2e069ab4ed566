"""Every reported fault of the catalogue: those that are planted, and those that are not, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.planted_bugs.registry import PLANTED


@dataclass(frozen=True)
class Entry:
    """One reported fault.

    Attributes:
        id: a letter for the kind of fault, and a number.
        source: where it was reported or fixed.
        symptom: what its users saw.
        missing: what planting it needs; "" where it is planted.
    """

    id: str
    source: tuple[str, ...]
    symptom: str
    missing: str = ""

    @property
    def status(self) -> str:
        return f"not planted: {self.missing}" if self.missing else "planted"


_QUANTISED_WEIGHTS = "no operation takes quantised weights"
_GRADIENTS = "no operation returns gradients"

NOT_PLANTED: tuple[Entry, ...] = (
    Entry(
        "B6",
        (
            "https://github.com/NVIDIA/Megatron-LM/pull/3026",
            "https://github.com/NVIDIA/Megatron-LM/commit/b0eb9143c3",
        ),
        "the sparse indexer selects other keys than the reference model",
        "the indexer takes operands that are rotated already, so the split into rotated and plain part is not its own",
    ),
    Entry(
        "B21",
        ("https://github.com/NVIDIA/Megatron-LM/commit/8e44748ee2",),
        "packed sequences with padding get wrong positions",
        "packed sequences have no padding between them",
    ),
    Entry(
        "B28",
        ("https://github.com/ROCm/aiter/pull/4195",),
        "garbage or a fault from padded tokens",
        "rope has no padded rows: every position it gets is valid",
    ),
    Entry(
        "C5",
        ("https://github.com/NVIDIA/TensorRT-LLM/pull/14793",),
        "a benchmark score drops by five points",
        _QUANTISED_WEIGHTS,
    ),
    Entry(
        "C6",
        (
            "https://github.com/ModelTC/LightLLM/pull/744",
            "https://github.com/ModelTC/LightLLM/commit/808d8325f",
        ),
        "absorbed weights are wrong after dequantising",
        _QUANTISED_WEIGHTS,
    ),
    Entry(
        "C12",
        ("https://github.com/vllm-project/vllm/pull/48986",),
        "an adapter on kv_b_proj has no effect in the absorbed path",
        "layers take no adapters",
    ),
    Entry(
        "C15",
        ("https://github.com/lablup/mlxcel/pull/618",),
        "the last decoder layer is left out",
        "the suite looks at one layer, not at a stack of them",
    ),
    Entry(
        "H13",
        ("https://github.com/ROCm/ATOM/pull/1772",),
        "answers are almost all wrong with an alias of a cache dtype",
        "cache formats have one name each; what the alias does, to leave the scale out, is I5",
    ),
    Entry(
        "J1",
        ("https://github.com/Dao-AILab/flash-attention/pull/2755",),
        "the backward pass writes before its buffer",
        _GRADIENTS,
    ),
    Entry(
        "J11",
        (
            "https://github.com/tile-ai/tilelang/pull/1588",
            "https://github.com/tile-ai/tilelang/commit/bb7f30c9c",
        ),
        "key and value gradients of sparse attention are wrong",
        _GRADIENTS,
    ),
    Entry(
        "K1",
        ("https://github.com/deepseek-ai/FlashMLA/commit/c759027",),
        "gradients are less accurate than they need be",
        _GRADIENTS,
    ),
    Entry(
        "K2",
        ("https://github.com/Dao-AILab/flash-attention/issues/2552",),
        "columns of the value gradient are corrupt",
        _GRADIENTS,
    ),
    Entry(
        "K3",
        (
            "https://github.com/NVIDIA/TransformerEngine/pull/1896",
            "https://github.com/NVIDIA/TransformerEngine/commit/9d173c93e",
        ),
        "key and value gradients of context-parallel ranks are mixed up",
        _GRADIENTS,
    ),
    Entry(
        "K5",
        ("https://github.com/NVIDIA/Megatron-LM/pull/6839",),
        "the gradient of the shared rope key is that of some heads only",
        _GRADIENTS,
    ),
    Entry(
        "K7",
        (
            "https://github.com/NVIDIA/Megatron-LM/pull/5273",
            "https://github.com/NVIDIA/Megatron-LM/commit/76d26e24b0",
        ),
        "a fused projection gets no weight gradient",
        _GRADIENTS,
    ),
    Entry(
        "K8",
        (
            "https://github.com/Dao-AILab/flash-attention/pull/2421",
            "https://github.com/ROCm/flash-attention/pull/179",
        ),
        "NaN in the gradients of sequences without queries",
        _GRADIENTS,
    ),
    Entry(
        "L10",
        ("https://github.com/ROCm/aiter/pull/3855",),
        "the scratch buffer takes 32 GiB",
        "workspaces are not part of an operation; only a layer's cache is counted",
    ),
)
"""Reported faults that no subject here can have."""


def catalogue() -> list[Entry]:
    """All reported faults in the order of their ids; one that is planted for several operations occurs once."""
    entries = {entry.id: entry for entry in NOT_PLANTED}
    for bug in reversed(PLANTED.values()):
        if bug.source:
            name = bug.id.partition("-")[0]
            entries[name] = Entry(name, bug.source, bug.symptom)
    return sorted(entries.values(), key=lambda entry: (entry.id[0], int(entry.id[1:])))
