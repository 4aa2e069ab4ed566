"""What the float64 reference computes from cases of weights; as in ``computed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mla_spec.golden.cases.case import Parameters, Values, config_from, layer_weights
from mla_spec.golden.corpus.computed import Computed, exactly
from mla_spec.reference.block_scales import CODE, dequantise_weight
from mla_spec.reference.formats import decode_bits
from mla_spec.reference.tensor_parallel import gather_gradients, shard_layer


def _dequantize_weight(x: Values, parameters: Parameters) -> Iterator[Computed]:
    rows, columns = parameters["block_size"]
    yield from exactly("out", dequantise_weight(decode_bits(x["codes"], CODE), x["scales"], (rows, columns)))


def _shard_layer(x: Values, parameters: Parameters) -> Iterator[Computed]:
    for rank, (weights, _) in enumerate(
        shard_layer(layer_weights(x), config_from(parameters["config"]), parameters["ranks"])
    ):
        for name, part in weights.items():
            yield from exactly(f"rank{rank}.{name}", part)


def _gather_gradients(x: Values, parameters: Parameters) -> Iterator[Computed]:
    ranks = [
        {name.removeprefix(prefix): part for name, part in x.items() if name.startswith(prefix)}
        for prefix in (f"rank{i}." for i in range(parameters["ranks"]))
    ]
    for name, gradient in gather_gradients(ranks).items():
        yield from exactly(name, gradient)


COMPUTED: dict[str, Callable[[Values, Parameters], Iterator[Computed]]] = {
    "dequantize_weight": _dequantize_weight,
    "shard_layer": _shard_layer,
    "gather_gradients": _gather_gradients,
}
