"""Cases: the inputs of one call, as plain data that can be written down, replayed and built again.

A case holds structure and a seed; ``build`` makes the values from a seeded generator, exactly representable in the case's
dtype. Its id is one string that carries all of it.
"""

from __future__ import annotations

from mla_spec.harness.backward_cases import PrefillBackwardCase, SparseBackwardCase
from mla_spec.harness.case import Case, read_case
from mla_spec.harness.decode_cases import DecodeCase, DecodeInputs
from mla_spec.harness.indexer_cases import ProjectIndexerCase
from mla_spec.harness.layer_cases import LayerCase, LayerInputs
from mla_spec.harness.layer_gradient_cases import LayerGradientCase, LayerGradientInputs
from mla_spec.harness.merge_cases import MergeCase, MergeInputs
from mla_spec.harness.parallel_cases import ShardedLayerCase
from mla_spec.harness.prefill_cases import PrefillCase, PrefillInputs
from mla_spec.harness.quantised_cases import PagesCase, QuantiseCase, QuantisedDecodeCase
from mla_spec.harness.rope_cases import YARN, RopeCase, make_rope
from mla_spec.harness.sparse_cases import IndexedAttentionCase, IndexerCase, SparseDecodeCase, SparsePrefillCase
from mla_spec.harness.weight_cases import QuantisedLayerCase, WeightCase
from mla_spec.harness.write_cases import WriteCase, WriteInputs

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
