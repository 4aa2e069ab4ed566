"""What exact attention and its bounds cost, relative to their two matrix products alone, against what they may cost.

python benchmarks/speed.py [--rounds N] [--long-keys T]

One thread, as in the command's workers. All ways take turns in one run, and what counts is the least processor time of each:
other processes disturb it least. Exits with 1 where a goal is missed. A million keys need 6 GB of memory; --long-keys 0 leaves
them out.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.attention import attention
from mla_spec.reference.typing import Array
from mla_spec.text.table import format_table

LATENT, WIDTH = 512, 576
SCALE = WIDTH**-0.5
PROFILE = Profile.default("bfloat16")
PRODUCTS = "the two products alone"
JUDGING = "exact value and worst-case bound"


@dataclass(frozen=True)
class Figure:
    """A measured number, and the largest that meets the goal; no goal where that is None."""

    what: str
    measured: float
    goal: float | None
    unit: str = "x"

    @property
    def missed(self) -> bool:
        return self.goal is not None and self.measured > self.goal

    def row(self) -> tuple[str, ...]:
        goal = "" if self.goal is None else f"{self.goal:g} {self.unit}"
        return self.what, f"{self.measured:.2f} {self.unit}", goal, "missed" if self.missed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--long-keys", type=int, default=10**6)
    options = parser.parse_args()
    figures = list(short(options.rounds))
    if options.long_keys:
        figures += long(options.long_keys, max(3, options.rounds // 4))
    print(format_table([("", "measured", "goal", ""), *(figure.row() for figure in figures)]))
    return int(any(figure.missed for figure in figures))


def short(rounds: int, heads: int = 128, keys: int = 8192) -> Iterator[Figure]:
    """One query of many heads over a sequence of usual length."""
    q, rows = operands(heads, keys)
    goals = {
        JUDGING: 2.7,
        "with the probable bound too": 3.3,
        "attention, as certified": 3.4,
        "attention, plain products": 1.3,
    }
    for what, ratio in ratios(ways(q, rows), rounds).items():
        yield Figure(f"{heads} heads, {keys} keys: {what}", ratio, goals.get(what))


def long(keys: int, rounds: int, heads: int = 16) -> Iterator[Figure]:
    """One query over a very long sequence."""
    q, rows = operands(heads, keys)
    few = {name: way for name, way in ways(q, rows).items() if name in (PRODUCTS, JUDGING)}
    fewer = ways(q, rows[: keys // 8])[JUDGING]
    at = f"{heads} heads, {keys} keys: "
    yield Figure(at + JUDGING, ratios(few, rounds)[JUDGING], 3.0)
    growth = ratios({PRODUCTS: fewer, JUDGING: few[JUDGING]}, rounds)[JUDGING]
    yield Figure(at + "time a key, relative to an eighth of the keys", growth / 8, 1.2)
    tracemalloc.start()
    few[JUDGING]()
    yield Figure(at + "memory beside the operands", tracemalloc.get_traced_memory()[1] / 1e6, 200, "MB")
    tracemalloc.stop()


def operands(heads: int, keys: int) -> tuple[Array, Array]:
    """(q [1, h, d], rows of the cache [t, 1, d]); values are the first columns of a row."""
    rng = np.random.default_rng(0)
    some = rng.standard_normal((min(keys, 8192), 1, WIDTH))
    return rng.standard_normal((1, heads, WIDTH)), np.resize(some, (keys, 1, WIDTH))


def ways(q: Array, rows: Array) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    values = rows[..., :LATENT]
    query, key, value = q[0], rows[:, 0], values[:, 0]
    weights = np.random.default_rng(1).random((len(query), len(key)))

    def bounded(probable: bool) -> object:
        return attention_with_bound(q, rows, values, softmax_scale=SCALE, profile=PROFILE, probable=probable)

    found: dict[str, Callable[[], object]] = {
        PRODUCTS: lambda: (query @ key.T, weights @ value),
        "attention, plain products": lambda: attention(q, rows, values, softmax_scale=SCALE, accurate=False),
        JUDGING: lambda: bounded(False),
        "with the probable bound too": lambda: bounded(True),
        "attention, as certified": lambda: attention(q, rows, values, softmax_scale=SCALE),
    }
    try:
        import torch
    except ImportError:
        return found
    q_, k_, v_ = (torch.from_numpy(x)[None, None] for x in (query, key, value))  # the heads are rows of one key head
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {**found, "torch's float64 SDPA": lambda: sdpa(q_, k_, v_, scale=SCALE)}


def ratios(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least time of each way relative to that of the first."""
    times = np.empty((rounds, len(ways)))
    for row in times:
        for i, way in enumerate(ways.values()):
            start = time.process_time()
            way()
            row[i] = time.process_time() - start
    least = times.min(axis=0)
    return dict(zip(ways, (least / least[0]).tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
