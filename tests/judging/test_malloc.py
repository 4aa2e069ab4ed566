"""Memory that is used again costs no faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CODE = """
import resource
import numpy as np
from mla_spec.judging.malloc import keep_freed_memory
{keep}
def use():
    for x in [np.empty(20 * 2**17) for _ in range(5)]:  # 20 MiB each
        x[::512] = 1
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another malloc than glibc's")
def test_freed_memory_is_kept() -> None:
    assert 10 * faults("keep_freed_memory()") < faults("")
