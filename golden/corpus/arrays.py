"""Arrays as files: .npy version 1.0, little-endian, C order, and nothing else.

A file must equal, byte for byte, the only header that fits its dtype and shape, followed by content of the right sha256. So
no header is ever evaluated and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.golden.corpus.error import CorpusError

Stored = NDArray[Any]
"""An array as it is in the file."""

STORED_DTYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "uint8": "|u1",
}
"""How each logical dtype is stored; bfloat16 as the upper 16 bits of the float32 of the same value."""

LARGEST_ARRAY = 2**28
"""Elements of an array, at most."""

_MAGIC = b"\x93NUMPY\x01\x00"


def header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of a file; written here because NumPy's padding is no promise."""
    text = f"{{'descr': '{STORED_DTYPES[dtype]}', 'fortran_order': False, 'shape': {shape}, }}"
    length = -(-(len(_MAGIC) + 2 + len(text) + 1) // 64) * 64  # the content starts at a multiple of 64
    padded = text.ljust(length - len(_MAGIC) - 3) + "\n"
    return _MAGIC + len(padded).to_bytes(2, "little") + padded.encode("ascii")


def content(array: Stored) -> bytes:
    """The bytes after the header."""
    return np.ascontiguousarray(array).tobytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode(values: NDArray[Any], dtype: str) -> Stored:
    """Values as they are stored.

    Raises:
        ValueError: a value is not exactly representable in ``dtype``.
    """
    if dtype == "bfloat16":
        bits = values.astype("<f4").view("<u4")
        stored = (bits >> 16).astype("<u2")
    else:
        stored = values.astype(STORED_DTYPES[dtype])
    if not np.array_equal(decode(stored, dtype), values, equal_nan="float" in dtype):
        raise ValueError(f"values are not exactly representable in {dtype}")
    return stored


def decode(stored: Stored, dtype: str) -> Stored:
    """The values: float64 for every floating-point dtype, int64 for integers; exact."""
    if dtype == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4").astype(np.float64)
    return stored.astype(np.float64 if "float" in dtype else np.int64)


def write(path: Path, array: Stored, dtype: str) -> None:
    path.write_bytes(header(dtype, array.shape) + content(array))


def read(path: Path, name: str, dtype: str, shape: tuple[int, ...], digest: str) -> Stored:
    """The array in ``path``, which messages call ``name``.

    Raises:
        CorpusError: missing, or not the header and content that dtype, shape and digest ask for.
    """
    wanted = header(dtype, shape)
    stored_dtype = np.dtype(STORED_DTYPES[dtype])
    size = len(wanted) + math.prod(shape) * stored_dtype.itemsize
    try:
        if not path.is_file():
            raise CorpusError(f"{name}: the file is missing; manifest.json lists it")
        with path.open("rb") as file:
            start = file.read(len(wanted))
            if start != wanted:
                raise CorpusError(f"{name}: {_fault(start, dtype, shape)}")
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise CorpusError(f"{name}: the file has {found} bytes; expected {size} for {dtype} {list(shape)}")
            data = file.read()
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read: {error.strerror}") from error
    if sha256(data) != digest:
        raise CorpusError(f"{name}: the content has sha256 {sha256(data)}; expected {digest}")
    return np.frombuffer(data, dtype=stored_dtype).reshape(shape)


def _fault(start: bytes, dtype: str, shape: tuple[int, ...]) -> str:
    """What is wrong with the first bytes of a file."""
    wanted = header(dtype, shape)
    if start[: len(_MAGIC)] != _MAGIC:
        return "not a .npy file of version 1.0; expected it to begin with \\x93NUMPY\\x01\\x00"
    length, allowed = int.from_bytes(start[8:10], "little"), len(wanted) - 10
    if length > allowed:
        return f"the header says it is {length} bytes long; expected {allowed}"
    if len(start) < len(wanted):
        return f"the file ends within the header; expected {len(wanted)} bytes of it"
    text = start[10:].decode("latin-1")
    for key, pattern, want in (
        ("dtype", r"'descr': ('[^']*')", f"'{STORED_DTYPES[dtype]}'"),
        ("order", r"'fortran_order': (\w+)", "False"),
        ("shape", r"'shape': (\([\d, ]*\))", str(shape)),
    ):
        found = re.search(pattern, text)
        if found and found[1] != want:
            return f"the header gives {key} {found[1]}; expected {want}"
    return "the header is not as this corpus writes it; expected exactly the bytes that README.md describes"
