"""Faults of what a cache is said to occupy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchLayer
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
