"""The laws of memory leave honest layers and kernels alone: pages, preallocation, tables and workspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchLayer
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.reference.config import MLAConfig
from mla_spec.subjects.supports import Supports

FEW = Options(examples=40)


class _PagedLayer(TorchLayer):
    """Keeps its rows in one buffer of whole pages, and keeps the buffer when it is reset where ``keeps`` says so."""

    page, keeps = 4, False
    buffer: Tensor | None = None
    tokens = 0

    def reset(self) -> None:
        super().reset()
        self.tokens = 0
        self.buffer = self.buffer if self.keeps else None

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        rows = torch.cat([latent, k_pe], dim=-1)
        end = self.tokens + rows.shape[1]
        pages = -(-end // self.page)
        if self.buffer is None or self.buffer.shape[1] < pages * self.page:
            grown = rows.new_zeros(len(rows), pages * self.page, rows.shape[-1])
            if self.buffer is not None:
                grown[:, : self.tokens] = self.buffer[:, : self.tokens]
            self.buffer = grown
        self.buffer[:, self.tokens : end] = rows
        self.tokens = end
        used = self.buffer[:, :end]
        self.cache = used[..., : latent.shape[-1]], used[..., latent.shape[-1] :]

    def cache_bytes(self) -> int:
        if self.tokens == 0 or self.buffer is None:
            return 0
        batch, _, width = self.buffer.shape
        return batch * -(-self.tokens // self.page) * self.page * width * self.buffer.element_size()


class Paged(TorchAbsorbed):
    """Grows by pages of 4 tokens, as it declares."""

    supports = Supports(cache_page=4)
    kind: type[_PagedLayer] = _PagedLayer

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return self.kind(self, weights, config)


class _PreallocatedLayer(_PagedLayer):
    page, keeps = 64, True


class Preallocated(Paged):
    """Has one buffer of 64 tokens from the first on."""

    supports = Supports(cache_page=64)
    kind = _PreallocatedLayer


class _LazyLayer(TorchLayer):
    workspace: Tensor | None = None
    table: Tensor | None = None

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        longest = int(positions.max()) + 1
        if self.table is None or len(self.table) < longest:
            self.table = torch.arange(longest).double().cos()
        if self.workspace is None or self.workspace.numel() < hidden.numel():
            self.workspace = torch.zeros(hidden.numel())
        return super().forward(hidden, positions)


class Lazy(TorchAbsorbed):
    """Makes tables and workspaces when they are first needed."""

    def __init__(self) -> None:
        self.scratch: dict[int, Tensor] = {}

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _LazyLayer(self, weights, config)

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        partial = self.scratch.setdefault(len(q), q.new_zeros(132 + len(q), *q.shape[1:]))
        assert partial is not None
        return super().decode(q, *args, **options)


class SwitchesOnce(TorchAbsorbed):
    """Splits keys among processors, with partial results, from 8 sequences on."""

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        partial = q.new_zeros(100, *q.shape) if len(q) >= 8 else None
        out = super().decode(q, *args, **options)
        del partial
        return out


@pytest.mark.parametrize("subject", [Paged, Preallocated, Lazy])
@pytest.mark.parametrize("law", ["test_layer_allocates_only_its_cache", "test_cache_bytes_are_exact"])
def test_honest_layers_pass(subject: type, law: str) -> None:
    record = run_law(all_laws()[law], subject(), FEW)
    assert record.verdict == "pass", record.text()


@pytest.mark.parametrize("subject", [Lazy, SwitchesOnce])
def test_honest_kernels_pass(subject: type) -> None:
    record = run_law(all_laws()["test_decode_memory_grows_with_the_batch"], subject(), FEW)
    assert record.verdict == "pass", record.text()


def test_pages_that_are_not_declared_are_a_violation() -> None:
    class Undeclared(Paged):
        supports = Supports()

    record = run_law(all_laws()["test_layer_allocates_only_its_cache"], Undeclared(), FEW)
    assert record.verdict == "fail"
    assert "since its reset a layer of 1 tokens keeps" in record.message
