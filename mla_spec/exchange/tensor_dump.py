"""Tensors by name from a file that another program wrote: torch.save or safetensors. Nothing in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mla_spec.exchange.tensor_file import LARGEST, ExchangeError, decode
from mla_spec.text.terminal import one_line, shown

SUFFIXES = (".pt", ".pth", ".safetensors")


def read_dump(path: Path) -> dict[str, Any]:
    """Tensors and numbers of a file by name, on the host; those of nested dicts and lists as "name.key".

    ``torch.save`` is read by ``torch.load`` with ``weights_only``, which makes tensors and plain values and nothing else.

    Raises:
        ExchangeError: it cannot be read, or is larger than 4 GiB.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ExchangeError(f"{shown(str(path))} is larger than {LARGEST} bytes")
        if path.suffix == ".safetensors":
            tensors, texts = decode(path.read_bytes(), shown(str(path)))
            return {**texts, **tensors}
        found = torch.load(path, map_location="cpu", weights_only=True)
    except ExchangeError:
        raise
    except OSError as error:
        raise ExchangeError(f"cannot read {shown(str(path))}: {error.strerror or error}") from error
    except Exception as error:  # torch.load has no class of its own for damaged files
        raise ExchangeError(f"{shown(str(path))} is nothing that torch.load reads: {one_line(error, 200)}") from error
    return dict(_flat(found, ""))


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return [pair for key, each in value.items() for pair in _flat(each, f"{prefix}{key}")]
    if isinstance(value, list | tuple):
        return [pair for i, each in enumerate(value) for pair in _flat(each, f"{prefix}{i}")]
    return [(name, value.detach() if isinstance(value, torch.Tensor) else value)]
