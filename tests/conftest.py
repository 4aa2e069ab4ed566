"""Set-up of all tests."""

import os

# Before numpy is imported: the arrays are so small that BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
