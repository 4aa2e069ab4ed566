"""Cases: the inputs of one call, as plain data that can be written down, replayed and built again.

A case holds structure and a seed; ``build`` makes the values from a seeded generator, exactly representable in the case's
dtype. Its id is one string that carries all of it.
"""

from __future__ import annotations

from mla_spec.operations.case import Case, read_case
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.operations.dequantize_weight import QuantisedLayerCase, WeightCase
from mla_spec.operations.gradients import PrefillBackwardCase, SparseBackwardCase
from mla_spec.operations.layer import LayerCase, LayerInputs
from mla_spec.operations.layer_gradients import LayerGradientCase, LayerGradientInputs
from mla_spec.operations.merge import MergeCase, MergeInputs
from mla_spec.operations.prefill import PrefillCase, PrefillInputs
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.operations.quantised_cache import PagesCase, QuantiseCase, QuantisedDecodeCase
from mla_spec.operations.rope import YARN, RopeCase, make_rope
from mla_spec.operations.shards import ShardedLayerCase
from mla_spec.operations.sparse import (
    IndexedAttentionCase,
    IndexerCase,
    SparseDecodeCase,
    SparsePrefillCase,
)
from mla_spec.operations.write_cache import WriteCase, WriteInputs

__all__ = [
    "KINDS",
    "YARN",
    "Case",
    "DecodeCase",
    "DecodeInputs",
    "IndexedAttentionCase",
    "IndexerCase",
    "LayerCase",
    "LayerGradientCase",
    "LayerGradientInputs",
    "LayerInputs",
    "MergeCase",
    "MergeInputs",
    "PagesCase",
    "PrefillBackwardCase",
    "PrefillCase",
    "PrefillInputs",
    "ProjectIndexerCase",
    "QuantiseCase",
    "QuantisedDecodeCase",
    "QuantisedLayerCase",
    "RopeCase",
    "ShardedLayerCase",
    "SparseBackwardCase",
    "SparseDecodeCase",
    "SparsePrefillCase",
    "WeightCase",
    "WriteCase",
    "WriteInputs",
    "make_rope",
    "parse_case",
]

_CLASSES: tuple[type[Case], ...] = (
    RopeCase,
    PrefillCase,
    PrefillBackwardCase,
    DecodeCase,
    MergeCase,
    WriteCase,
    WeightCase,
    QuantiseCase,
    PagesCase,
    QuantisedDecodeCase,
    SparsePrefillCase,
    SparseDecodeCase,
    SparseBackwardCase,
    ProjectIndexerCase,
    IndexerCase,
    IndexedAttentionCase,
    LayerCase,
    QuantisedLayerCase,
    LayerGradientCase,
    ShardedLayerCase,
)

KINDS: dict[str, type[Case]] = {c.kind: c for c in _CLASSES}
"""The classes of cases by the word that begins their ids."""


def parse_case(text: str) -> Case:
    """The case with this id; ValueError names the part that cannot be read."""
    kind = text.partition(":")[0]
    if kind not in KINDS:
        raise ValueError(f"case {text!r}: unknown kind {kind!r}; known are {', '.join(KINDS)}")
    return read_case(KINDS[kind], text)
