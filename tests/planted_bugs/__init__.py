"""Correct subjects with one fault each, most of them faults that shipped; every one must fail a law.

A bug's id is its place in the catalogue: a letter for the kind of fault, and a number, then the operation where one report
is planted in several. ``mla-spec check`` takes ``PlantedBug.spec`` as the name of the subject.
"""

from mla_spec.planted_bugs import (
    aliasing,
    batching,
    cache_accounting,
    cache_writes,
    indexers,
    layers,
    lse,
    masks,
    merges,
    numerics,
    paging,
    parallelism,
    prefills,
    quantised_readers,
    quantised_writers,
    rope,
    softmax_scale,
    sparse,
    state,
    statistics,
    strides,
    variants,
    weights,
)
from mla_spec.planted_bugs.registry import PLANTED, PlantedBug

__all__ = [
    "PLANTED",
    "PlantedBug",
    "aliasing",
    "batching",
    "cache_accounting",
    "cache_writes",
    "indexers",
    "layers",
    "lse",
    "masks",
    "merges",
    "numerics",
    "paging",
    "parallelism",
    "prefills",
    "quantised_readers",
    "quantised_writers",
    "rope",
    "softmax_scale",
    "sparse",
    "state",
    "statistics",
    "strides",
    "variants",
    "weights",
]
