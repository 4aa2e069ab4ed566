"""What the error bound costs beside the reference: the ratio of their times, measured in turn in one run.

python benchmarks/bound_cost.py [--heads H] [--keys T] [--rounds N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.attention import attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, options.heads, 576))
    rows = rng.standard_normal((options.keys, 1, 576))
    values = rows[..., :512]
    profile = Profile.default("bfloat16")
    ways: dict[str, Callable[[], object]] = {
        "reference": lambda: attention(q, rows, values, softmax_scale=576**-0.5),
        "with worst-case bound": lambda: attention_with_bound(
            q, rows, values, softmax_scale=576**-0.5, profile=profile
        ),
        "with probable bound too": lambda: attention_with_bound(
            q, rows, values, softmax_scale=576**-0.5, profile=profile, probable=True
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    base = np.median(times["reference"])
    for name, taken in times.items():
        print(f"{name:26} {np.median(taken) * 1e3:8.1f} ms  {np.median(taken) / base:.2f} x")


if __name__ == "__main__":
    main()
