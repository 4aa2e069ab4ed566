"""What a case of the corpus is, and the numbers that fill it.

Inputs are dyadic rationals k / 2^n of at most as many bits as the dtype holds, made by an exact integer recurrence, so they
are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.reference.config import Llama4Scaling, LongRopeScaling, MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.formats import format_of
from mla_spec.reference.indexer import IndexerConfig
from mla_spec.reference.typing import Array

Values = Mapping[str, NDArray[Any]]
"""Arrays of a case by name."""

Parameters = Mapping[str, Any]
"""What an operation takes beside arrays, by name: plain JSON."""

CANONICAL_NAN = np.array([0x7FF8000000000000], dtype="<u8").view("<f8")[0]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one operation.

    Attributes:
        name: also the beginning of its files' names.
        operation: a key of ``ENCLOSURES`` or ``RATIONAL`` of ``mla_spec.golden.exact.expected``.
        purpose: what is checked.
        catches: the kinds of fault that show here, in words.
        sources: where such faults were reported or fixed; some are known without a public report.
        parameters: what the operation takes beside arrays; plain JSON.
        inputs: float64 values (exactly representable in ``dtype``) and integer arrays.
        dtype: in which floating-point inputs are stored; results are float64.
        dtypes: that of single inputs where it is another.
        exact: results of which float64 arithmetic gives the expected bits in any order of its sums.
    """

    name: str
    operation: str
    purpose: str
    catches: str
    sources: tuple[str, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    inputs: Values
    dtype: str = "float64"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    exact: tuple[str, ...] = ()


def on_github(*paths: str) -> tuple[str, ...]:
    """Addresses of pull requests, issues and commits."""
    return tuple(f"https://github.com/{path}" for path in paths)


class Numbers:
    """Pseudo-random numbers by the 64-bit recurrence of SplitMix64 (Steele, Lea and Flood 2014), in Python integers."""

    _MASK = 2**64 - 1

    def __init__(self, name: str) -> None:
        self._state = int.from_bytes(name.encode(), "little") & self._MASK
        for byte in name.encode():
            self._state = self._next() ^ byte

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & self._MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self._MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self._MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """An integer of 0 .. n - 1."""
        return self._next() % n

    def array(self, *shape: int, size: float = 1.0, centre: float = 0.0, dtype: str = "float64") -> Array:
        """Multiples of an ulp of ``dtype`` between centre − size and centre + size, both powers of two or 0."""
        precision = format_of(dtype).precision
        most = 2 ** (precision - (2 if centre else 1))
        numbers = [self.below(2 * most - 1) + 1 - most for _ in range(math.prod(shape))]
        return centre + np.array([k * (size / most) for k in numbers]).reshape(shape)

    def integers(self, *shape: int) -> Array:
        """Integers of -32 .. 32, as float64."""
        return np.array([float(self.below(65) - 32) for _ in range(math.prod(shape))]).reshape(shape)

    def permutation(self, n: int) -> list[int]:
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


# Parameters


def rope_from(parameters: Mapping[str, Any]) -> RopeConfig:
    """The RopeConfig whose fields ``parameters`` holds."""
    fields = dict(parameters)
    yarn, longrope = fields.pop("yarn"), fields.pop("longrope")
    if longrope is not None:
        lists = {name: tuple(longrope[name]) for name in ("short_factor", "long_factor")}
        longrope = LongRopeScaling(**{**longrope, **lists})
    return RopeConfig(**fields, yarn=None if yarn is None else YarnScaling(**yarn), longrope=longrope)


_LATER = {f.name: f.default for f in fields(MLAConfig) if f.name in ("k_pe_norm", "output_gate", "attention_sink")}


def config_parameters(config: MLAConfig) -> dict[str, Any]:
    """The fields of ``config``, without those that came after the corpus was frozen where they say what was so before."""
    return {name: value for name, value in asdict(config).items() if name not in _LATER or value != _LATER[name]}


def config_from(parameters: Mapping[str, Any]) -> MLAConfig:
    """The MLAConfig whose fields ``parameters`` holds."""
    given = dict(parameters)
    rope, temperature = given.pop("rope"), given.pop("llama_4_scaling")
    return MLAConfig(
        **given,
        rope=None if rope is None else rope_from(rope),
        llama_4_scaling=None if temperature is None else Llama4Scaling(**temperature),
    )


def indexer_config_from(parameters: Mapping[str, Any]) -> IndexerConfig:
    """The IndexerConfig whose fields ``parameters`` holds."""
    rope = parameters["rope"]
    return IndexerConfig(**{**parameters, "rope": None if rope is None else rope_from(rope)})


def layer_weights(inputs: Values) -> dict[str, Array]:
    """The inputs whose names begin with "weights."."""
    prefix = "weights."
    return {name.removeprefix(prefix): x for name, x in inputs.items() if name.startswith(prefix)}
