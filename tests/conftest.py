"""Set-up of all tests."""

import os
import sys
from collections.abc import Iterator

import pytest

from mla_spec.judging.malloc import keep_freed_memory

# Before numpy is imported: the arrays are so small that BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


keep_freed_memory()


@pytest.fixture(autouse=True)
def search_path() -> Iterator[None]:
    """A check makes the folder of a subject's file importable; a test's folder must not be searched by later tests."""
    before = list(sys.path)
    yield
    sys.path[:] = before
