"""What is kept of a tensor in a dump of structure: dtype, shape and four numbers, from which one like it is drawn."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mla_spec.exchange.tensor_file import DTYPES, ExchangeError
from mla_spec.text.terminal import shown
from mla_spec.text.typed import Mistyped, Size, read_object

FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of the finite elements of a tensor: mean, standard deviation, least and most; 0 where there are none."""

    dtype: str
    shape: tuple[Size, ...]
    mean: float
    std: float
    least: float
    most: float

    @property
    def bytes(self) -> int:
        """Of a tensor of this shape."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def encoded(self) -> str:
        """The text of a file."""
        return json.dumps(asdict(self))

    def drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Numbers of a normal distribution, within least and most: the same ones for the same moments and name."""
        seed = int.from_bytes(hashlib.sha256(f"{name} {self.encoded()}".encode()).digest()[:4], "little")
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        made: Tensor = (x * self.std + self.mean).clamp(self.least, self.most).to(DTYPES[self.dtype])
        return made


def moments_of(x: Tensor, shape: tuple[int, ...], dtype: str) -> Moments:
    """The moments of ``x``, for a tensor of this shape and dtype."""
    numbers = x.detach().to(torch.float64).flatten()
    finite = numbers[numbers.isfinite()]
    if finite.numel() == 0:
        return Moments(dtype=dtype, shape=shape, mean=0.0, std=0.0, least=0.0, most=0.0)
    mean, std, least, most = (float(f) for f in (finite.mean(), finite.std(correction=0), finite.min(), finite.max()))
    return Moments(dtype=dtype, shape=shape, mean=mean, std=std, least=least, most=most)


def read_moments(text: object, where: str) -> Moments:
    """The moments in a text that was JSON; ExchangeError where it is something else."""
    try:
        found: Moments = read_object(Moments, text, where)
    except Mistyped as error:
        raise ExchangeError(str(error)) from error
    if found.dtype not in FLOATS:
        raise ExchangeError(f"{where}: dtype is {shown(found.dtype)}; expected one of {', '.join(FLOATS)}")
    if found.std < 0 or found.least > found.most:
        raise ExchangeError(
            f"{where}: std is {found.std} and least {found.least}, most {found.most}; expected std >= 0 and least <= most"
        )
    if math.prod(max(n, 1) for n in found.shape) >= 2**62:
        raise ExchangeError(f"{where}: the shape is {shown(list(found.shape))}; expected fewer than 2^62 elements")
    return found
