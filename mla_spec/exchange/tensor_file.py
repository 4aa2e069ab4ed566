"""Tensors and texts as the bytes of one safetensors file, the same bytes for the same contents."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import deserialize
from torch import Tensor

from mla_spec.text.terminal import shown

LARGEST = 2**32
"""Bytes of one file or message, at most."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types by their name in a header. F4, two to a byte, is read as bytes: torch computes nothing with it."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ExchangeError(Exception):
    """A file, a folder or a message of an exchange is not what it should be; the text is one sentence."""


def encode(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """The bytes of a file: tensors by name, dense, widest elements first and then by name; texts sorted.

    Raises:
        ExchangeError: a tensor has a dtype that files do not have.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(texts.items()))} if texts else {}
    contents, end = [], 0
    for name in order:
        data = _bytes_of(tensors[name])
        header[name] = {
            "dtype": dtype_name(name, tensors[name]),
            "shape": list(tensors[name].shape),
            "data_offsets": [end, end + len(data)],
        }
        contents.append(data)
        end += len(data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *contents])


def dtype_name(name: str, x: Tensor) -> str:
    """What a header calls the dtype of a tensor, which messages call ``name``; ExchangeError where files do not have it."""
    if x.dtype not in _NAMES:
        raise ExchangeError(f"{name} is of {x.dtype}; a file holds {', '.join(DTYPES)}")
    return _NAMES[x.dtype]


def _bytes_of(x: Tensor) -> bytes:
    """The elements of a tensor, last index fastest, little-endian as every machine that torch runs on."""
    if x.numel() == 0:
        return b""
    flat: bytes = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return flat


def decode(data: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and texts of a file; ``what`` names it in messages.

    Raises:
        ExchangeError: it is no safetensors file, or holds an element type that calls do not have.
    """
    try:
        found: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except Exception as error:  # the library has no class of its own for every fault
        raise ExchangeError(f"{what} is no safetensors file: {_first_line(error)}") from error
    tensors = {}
    for name, entry in found:
        try:
            tensors[name] = _tensor(entry["data"], entry["dtype"], entry["shape"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ExchangeError(
                f"{what}: {shown(name)} is {shown(entry.get('dtype'))} {entry.get('shape')}; "
                f"expected one of {', '.join(DTYPES)}, in a shape that its bytes fill"
            ) from error
    size = int.from_bytes(data[:8], "little")
    texts = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    return tensors, {str(key): str(value) for key, value in texts.items()}


def _tensor(data: bytes, dtype: str, shape: list[int]) -> Tensor:
    if dtype == "F4":
        dtype, shape = "U8", [*shape[:-1], shape[-1] // 2]
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
