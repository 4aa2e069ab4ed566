"""Faults of what a cache is said to occupy, and of what it occupies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchLayer
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig


class _Counts(TorchLayer):
    """A layer that counts ``row`` elements per token."""

    def row(self, config: MLAConfig) -> int:
        raise NotImplementedError

    def cache_bytes(self) -> int:
        if self.cache is None:
            return 0
        latent = self.cache[0]
        return latent.shape[0] * latent.shape[1] * self.row(self.config) * latent.element_size()


class _CountsKeysAndValues(_Counts):
    def row(self, config: MLAConfig) -> int:
        return 2 * config.kv_lora_rank


@planted(
    "L1",
    source=(
        "https://github.com/LMCache/LMCache/pull/694",
        "https://github.com/LMCache/LMCache/pull/715",
    ),
    symptom="a calculator gives nearly twice the cache",
    shows_when="always",
    killed_by=("test_cache_bytes_are_exact",),
)
class CountsKeysAndValues(TorchAbsorbed):
    """The latent is counted as keys and as values, the rope part not at all."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _CountsKeysAndValues(self, weights, config)


class _CountsExpandedHeads(_Counts):
    def row(self, config: MLAConfig) -> int:
        return config.num_heads * (config.qk_head_dim + config.v_head_dim)


@planted(
    "L2",
    source=(
        "https://github.com/vllm-project/vllm/pull/32614",
        "https://github.com/vllm-project/vllm/pull/32759",
    ),
    symptom="about four times the cache that is needed",
    shows_when="always",
    killed_by=("test_cache_bytes_are_exact",),
)
class CountsExpandedHeads(TorchAbsorbed):
    """The cache of multi-head attention is allocated: expanded keys and values of every head."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _CountsExpandedHeads(self, weights, config)


class _CountsLatentTwice(_Counts):
    def row(self, config: MLAConfig) -> int:
        return config.cache_dim + config.kv_lora_rank


@planted(
    "L4",
    source=("https://github.com/ggml-org/llama.cpp/pull/19067",),
    symptom="the cache holds the latent a second time",
    shows_when="always",
    killed_by=("test_cache_bytes_are_exact",),
)
class CountsLatentTwice(TorchAbsorbed):
    """The latent is stored with the keys and again as values."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _CountsLatentTwice(self, weights, config)


class _CountsQueryWidth(_Counts):
    def row(self, config: MLAConfig) -> int:
        return config.num_heads * config.qk_head_dim


@planted(
    "L5",
    source=(
        "https://github.com/ikawrakow/ik_llama.cpp/pull/497",
        "https://github.com/ikawrakow/ik_llama.cpp/commit/2c5ecd478",
    ),
    symptom="saved caches cannot be used",
    shows_when="several heads, or head widths that differ from the row",
    killed_by=("test_cache_bytes_are_exact",),
)
class CountsQueryWidth(TorchAbsorbed):
    """A row is taken to be as wide as the keys of all heads."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _CountsQueryWidth(self, weights, config)


class _CountsPages(TorchLayer):
    def cache_bytes(self) -> int:
        return super().cache_bytes() // 16


@planted(
    "F24",
    source=("https://github.com/ROCm/ATOM/pull/1807",),
    symptom="a reloaded cache is corrupt",
    shows_when="always",
    killed_by=("test_cache_bytes_are_exact",),
)
class CountsPages(TorchAbsorbed):
    """Pages of 16 tokens are counted as single tokens."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _CountsPages(self, weights, config)


ALLOCATES = "test_layer_allocates_only_its_cache"


class _Claims(TorchLayer):
    """A layer that says its cache has the rows of MLA, whatever it keeps."""

    tokens = 0

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        super().append(latent, k_pe)
        self.tokens += latent.shape[0] * latent.shape[1]

    def reset(self) -> None:
        super().reset()
        self.tokens = 0

    def cache_bytes(self) -> int:
        return self.tokens * self.config.cache_dim * self.weights["o_proj"].element_size()


class _KeepsExpandedHeads(_Claims):
    expanded: list[Tensor]

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        super().append(latent, k_pe)
        assert self.cache is not None
        self.expanded = [self.subject.linear(self.cache[0][:, None], w) for w in (self.w_uk, self.w_uv)]


@planted(
    "L2-memory",
    source=(
        "https://github.com/vllm-project/vllm/pull/32614",
        "https://github.com/vllm-project/vllm/pull/32759",
    ),
    symptom="about four times the cache that is needed",
    shows_when="always",
    killed_by=(ALLOCATES,),
)
class KeepsExpandedHeads(TorchExplicit):
    """Keys and values of every head are kept, although the layer says that it has the cache of MLA."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _KeepsExpandedHeads(self, weights, config)


class _KeepsLatentTwice(_Claims):
    values: Tensor | None = None

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        super().append(latent, k_pe)
        assert self.cache is not None
        self.values = self.cache[0].clone()

    def reset(self) -> None:
        super().reset()
        self.values = None


@planted(
    "L4-memory",
    source=("https://github.com/ggml-org/llama.cpp/pull/19067",),
    symptom="the cache holds the latent a second time",
    shows_when="always",
    killed_by=(ALLOCATES,),
)
class KeepsLatentTwice(TorchAbsorbed):
    """The latent is kept once more as values, and not counted."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _KeepsLatentTwice(self, weights, config)


class _KeepsFloat32(_Claims):
    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        wide = torch.promote_types(latent.dtype, torch.float32)
        super().append(latent.to(wide), k_pe.to(wide))

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return super().forward(hidden, positions).to(hidden.dtype)


@planted(
    "X-cache-kept-in-float32",
    symptom="twice the cache that the configuration says",
    shows_when="a 16-bit dtype",
    killed_by=(ALLOCATES,),
)
class KeepsFloat32(TorchAbsorbed):
    """Rows are kept in the format of the arithmetic, and counted in that of the weights."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _KeepsFloat32(self, weights, config)

    def project_output(self, out: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        return super().project_output(out.to(weights["o_proj"].dtype), weights, config)


class _KeepsSlices(TorchLayer):
    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        super().append(latent, k_pe)
        assert self.cache is not None
        whole = torch.cat([*self.cache, torch.zeros_like(self.cache[0])], dim=-1)
        widths = [part.shape[-1] for part in self.cache]
        self.cache = whole[..., : widths[0]], whole[..., widths[0] : sum(widths)]


@planted(
    "X-cache-of-slices",
    symptom="out of memory at half the context that the cache's size promises",
    shows_when="always",
    killed_by=(ALLOCATES,),
)
class KeepsSlices(TorchAbsorbed):
    """The cache is made of slices of wider rows, which stay in memory as long as their slices do."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _KeepsSlices(self, weights, config)


class _RecordsRows(TorchLayer):
    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        super().append(latent, k_pe)
        assert isinstance(self.subject, RecordsRows)
        self.subject.seen.append(latent.clone())


@planted(
    "X-subject-keeps-every-row",
    symptom="memory grows from request to request",
    shows_when="always",
    killed_by=(ALLOCATES,),
)
class RecordsRows(TorchAbsorbed):
    """Rows are also kept in a list outside of the layer, for statistics that nobody reads."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _RecordsRows(self, weights, config)


@planted(
    "L10",
    source=("https://github.com/ROCm/aiter/pull/3855",),
    symptom="the scratch buffer takes 32 GiB",
    shows_when="many more sequences than processors",
    killed_by=("test_decode_memory_grows_with_the_batch",),
)
class ScratchOfTilesTimesBudget(TorchAbsorbed):
    """There is room for a whole budget of partial outputs in each tile, where all tiles share it.

    The budget is the number of processors, 4 here, or that of tiles where there are more.
    """

    processors = 4

    def decode(self, q: Tensor, *args: Any, head_dim_v: int, **options: Any) -> tuple[Tensor, Tensor | None]:
        tiles = len(q)
        budget = max(self.processors, tiles)
        scratch = q.new_empty(tiles * budget, *q.shape[1:3], head_dim_v)
        out, lse = super().decode(q, *args, head_dim_v=head_dim_v, **options)
        scratch[:tiles] = out
        return scratch[:tiles].clone(), lse


class _CountsAlignedRows(_Counts):
    def row(self, config: MLAConfig) -> int:
        return -(-config.cache_dim // 128) * 128 if config.cache_dim > 256 else config.cache_dim


@planted(
    "X-rows-aligned-to-128",
    symptom="the scheduler admits a tenth fewer tokens than fit",
    shows_when="rows of 288, 320 or 576 elements",
    killed_by=("test_cache_bytes_are_those_of_published_models",),
)
class CountsAlignedRows(TorchAbsorbed):
    """Rows wider than two tiles count as whole tiles of 128 elements, which they are not stored in."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return _CountsAlignedRows(self, weights, config)
