"""Third-party kernels from a folder that ``collect.py`` filled: files of vLLM and SGLang, imported without their packages.

``MLA_SPEC_BROUGHT`` names the folder. What the files import of their packages and is not there is a stand-in: which platform
this is, and nothing else.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl


def folder() -> Path:
    """The folder that was brought."""
    return Path(os.environ["MLA_SPEC_BROUGHT"])


def stand_in(name: str, **attributes: Any) -> ModuleType:
    """A module ``name`` with these attributes; its parents are made where they are not there."""
    parent, _, child = name.rpartition(".")
    if parent and parent not in sys.modules:
        shell(parent)
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(attributes)
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def shell(package: str) -> None:
    """A package of the brought folder, and its parents, whose ``__init__`` is not run."""
    parts = package.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        if name not in sys.modules:
            stand_in(name).__path__ = [str(folder().joinpath(*parts[:i]))]


class Platform:
    """What vLLM says of the machine: every question that is not answered here has the answer no."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: name in ("is_cuda", "is_cuda_alike") and torch.cuda.is_available()

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn


def vllm(module: str) -> Any:
    """A file of vllm/v1/attention/ops."""
    stand_in("vllm.platforms", current_platform=Platform())
    stand_in("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
    shell("vllm.v1.attention.ops")
    return importlib.import_module(f"vllm.v1.attention.ops.{module}")


def sglang(module: str) -> Any:
    """A file of sglang/kernels/ops/attention."""
    never = ("is_hip", "is_gfx95_supported", "is_gfx1250_supported", "is_gfx942_supported")
    answers = dict.fromkeys(never, lambda: False)
    stand_in("sglang.srt.utils", is_cuda=torch.cuda.is_available, get_device_core_count=lambda index=0: 1, **answers)
    shell("sglang.kernels.ops.attention")
    return importlib.import_module(f"sglang.kernels.ops.attention.{module}")
