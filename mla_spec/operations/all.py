"""Every operation, and every kind of case."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from mla_spec.operations import (
    absorb,
    decode,
    dequantize_weight,
    gradients,
    indexer,
    layer,
    layer_gradients,
    merge,
    merge_gradients,
    prefill,
    project_indexer,
    quantised_cache,
    quantised_decode,
    ragged,
    rank_decode,
    rope,
    rope_gradients,
    shards,
    sparse,
    write_cache,
)
from mla_spec.operations.case import Case, read_case
from mla_spec.operations.case_limits import fault
from mla_spec.operations.operation import Operation
from mla_spec.operations.regimes import Regime
from mla_spec.text.terminal import shown


@dataclass(frozen=True)
class Composite:
    """An operation that gives no tensors but an object, or a table of weights; a driver of its own calls it.

    Attributes:
        name: of the subject's method.
        call, returns: as one writes them.
        contract: the text that states it.
    """

    name: str
    call: str
    returns: str
    contract: str


def _composite(module: ModuleType, call: str, returns: str) -> Composite:
    assert module.__doc__ is not None
    return Composite(call.partition("(")[0], call, returns, module.__doc__)


CALLED: tuple[Operation, ...] = (
    rope.OPERATION,
    absorb.OPERATION,
    dequantize_weight.OPERATION,
    prefill.OPERATION,
    decode.OPERATION,
    ragged.OPERATION,
    rank_decode.OPERATION,
    merge.OPERATION,
    write_cache.OPERATION,
    quantised_cache.QUANTIZE_CACHE,
    quantised_cache.DEQUANTIZE_CACHE,
    quantised_decode.OPERATION,
    sparse.SPARSE_PREFILL,
    sparse.SPARSE_DECODE,
    project_indexer.OPERATION,
    indexer.OPERATION,
)
"""The operations that take tensors and give tensors."""

COMPOSITES: tuple[Composite, ...] = (
    _composite(layer, "layer(weights, config)", "an object with prefill, decode, reset and cache_bytes"),
    _composite(shards, "shard_layer(weights, config, *, ranks)", "[(weights, config), ...], one per rank"),
    _composite(shards, "gather_gradients(gradients, *, config)", "{name: gradient}"),
)

_EVERY: tuple[Operation | Composite, ...] = (*CALLED, *COMPOSITES)

OPERATIONS = {operation.name: operation for operation in _EVERY}
"""Every operation of the contract by name, in the order of reports."""

_REGIMES: dict[type[Case], tuple[Regime, ...]] = {
    **{operation.case: operation.regimes for operation in CALLED},
    **gradients.REGIMES,
    indexer.IndexedAttentionCase: indexer.INDEXED_REGIMES,
    layer.LayerCase: (*layer.REGIMES, *layer.DECODING),
    dequantize_weight.QuantisedLayerCase: layer.REGIMES,
    layer_gradients.LayerGradientCase: layer.REGIMES,
    rope_gradients.RopeBackwardCase: rope.REGIMES,
    **merge_gradients.REGIMES,
    shards.ShardedLayerCase: shards.REGIMES,
}
KINDS: dict[str, type[Case]] = {case.kind: case for case in _REGIMES}
"""The classes of cases by the word that begins their ids."""

REGIMES: dict[str, tuple[Regime, ...]] = {case.kind: regimes for case, regimes in _REGIMES.items()}
"""The regimes of each kind of case."""


def parse_case(text: str) -> Case:
    """The case with this id.

    Raises:
        ValueError: a part cannot be read, has a value that makes no sense, or asks for more than a machine should hold.
    """
    kind = text.partition(":")[0]
    if kind not in KINDS:
        raise ValueError(f"case {shown(text)}: unknown kind {shown(kind)}; known are {', '.join(KINDS)}")
    case = read_case(KINDS[kind], text)
    if why := fault(case):
        raise ValueError(f"case {shown(text)}: {why}")
    return case


def regimes_of(case: Case) -> tuple[str, ...]:
    """The regimes to which a case belongs."""
    return tuple(name for name, holds in REGIMES[case.kind] if holds(case))
