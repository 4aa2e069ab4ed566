"""What mla_spec.audit and mla_spec.record cost a caller: a call that is not taken, and one that is, against what they may cost.

python benchmarks/audit.py [--calls N] [--rounds N]

What counts is the least time: other processes disturb it least. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.text.table import format_table

SEQUENCES, HEADS, KEYS, PAGE, LATENT, WIDTH = 8, 16, 4096, 64, 512, 576
LEAST = 5.0
"""Microseconds that a call may cost that is not taken."""
SHARE = 1.0
"""Percent of a decode that one call in a thousand may cost."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows, missed = [("", "measured", "goal", "")], False
    with tempfile.TemporaryDirectory() as folder:
        places, keywords = decode()
        alone = least(lambda: TorchAbsorbed().decode(*places, **keywords), options.rounds)
        rows.append(("a decode of 8 sequences, 16 heads and 4096 keys", f"{1e3 * alone:.1f} ms", "", ""))
        for name, wrap in (("audit", mla_spec.audit), ("record", mla_spec.record)):
            idle = idle_cost(wrap, f"{folder}/{name}-0", options.calls)
            taken = taken_cost(wrap, f"{folder}/{name}-1", places, keywords, alone, options.rounds)
            share = 100 * taken / 1000 / alone
            rows.append((f"{name}, a call that is not taken", f"{idle:.2f} us", f"{LEAST} us", said(idle > LEAST)))
            rows.append((f"{name}, that decode taken", f"{1e3 * taken:.1f} ms", "", ""))
            rows.append((f"{name} at rate 0.001", f"{share:.2f} %", f"{SHARE} %", said(share > SHARE)))
            missed |= idle > LEAST or share > SHARE
    print(format_table(rows))
    return int(missed)


def said(missed: bool) -> str:
    return "missed" if missed else ""


def decode() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The arguments of one call."""
    pages = KEYS // PAGE
    q = torch.randn(SEQUENCES, 1, HEADS, WIDTH).bfloat16()
    cache = torch.randn(SEQUENCES * pages, PAGE, 1, WIDTH).bfloat16()
    table = torch.randperm(SEQUENCES * pages).int().reshape(SEQUENCES, pages)
    lengths = torch.full((SEQUENCES,), KEYS, dtype=torch.int32)
    return (q, cache, table, lengths), {"head_dim_v": LATENT, "softmax_scale": WIDTH**-0.5, "causal": True}


def least(work: Callable[[], object], rounds: int) -> float:
    """Seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def idle_cost(wrap: Callable[..., Any], folder: str, calls: int) -> float:
    """Microseconds that a call costs at rate 0."""

    def merge(outs: torch.Tensor, lses: torch.Tensor) -> None:
        return None

    wrapped, x = wrap(merge, operation="merge", directory=folder, rate=0), torch.zeros(1)

    def many(function: Callable[..., Any]) -> Callable[[], None]:
        def work() -> None:
            for _ in range(calls):
                function(x, x)

        return work

    return 1e6 * (least(many(wrapped), 5) - least(many(merge), 5)) / calls


def taken_cost(
    wrap: Callable[..., Any], folder: str, places: Any, keywords: dict[str, Any], alone: float, rounds: int
) -> float:
    """Seconds that a taken call costs more than one that is not."""
    kernel = wrap(TorchAbsorbed(), directory=folder, rate=1)
    taken = least(lambda: kernel.decode(*places, **keywords), rounds)
    if hasattr(kernel, "auditing"):
        kernel.auditing.close()
        print(kernel.auditing.report())
    assert Path(folder).exists()
    return max(0.0, taken - alone)


if __name__ == "__main__":
    sys.exit(main())
