"""Recorded calls from wherever they lie: our own folders, what FlashInfer's flight recorder wrote, and plain files of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mla_spec.exchange.flashinfer_dumps import METADATA, flashinfer_calls
from mla_spec.exchange.folder import INDEX, Folder, read_calls
from mla_spec.exchange.named_tensors import named_calls
from mla_spec.exchange.recorded import Recorded
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.text.terminal import shown


def recorded_calls(path: str, names: str | None = None) -> Iterator[Recorded]:
    """The calls in a folder.

    Args:
        names: a file that says which tensors of plain files are which arguments; None for folders that say it themselves.

    Raises:
        ExchangeError: the folder holds nothing of the kind, or is damaged.
    """
    folder = Path(path)
    if names is not None:
        return named_calls(folder, names)
    if (folder / INDEX).exists():
        return _ours(Folder.opened(path))
    if next(folder.glob(f"*/{METADATA}"), None) is not None or (folder / METADATA).exists():
        return flashinfer_calls(folder)
    raise ExchangeError(
        f"{shown(path)} holds no recorded calls; expected {INDEX} of mla_spec.record, dumps of FlashInfer with {METADATA}, or "
        "files of tensors and --map"
    )


def _ours(folder: Folder) -> Iterator[Recorded]:
    for name, call in read_calls(folder):
        answer = partial(folder.answer, name) if folder.has_answer(name) else None
        yield Recorded(name, call, answer, folder.declared)
