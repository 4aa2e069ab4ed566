"""vLLM's Triton decode multiplies and sums q·k in float16 where there is one head, and in float32 where there are two."""

import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton

folder = importlib.util.find_spec("vllm").submodule_search_locations[0]
for name in ("vllm", "vllm.platforms", "vllm.triton_utils"):
    sys.modules[name] = ModuleType(name)
sys.modules["vllm.platforms"].current_platform = SimpleNamespace(is_rocm=lambda: False)
sys.modules["vllm.triton_utils"].__dict__.update(triton=triton, tl=triton.language)
spec = importlib.util.spec_from_file_location("kernel", f"{folder}/v1/attention/ops/triton_decode_attention.py")
sys.modules["kernel"] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
torch.manual_seed(0)
q, cache, scale = torch.randn(1, 1, 576).half(), torch.randn(1, 16, 1, 576).half(), 192**-0.5
want, off = torch.logsumexp(scale * cache[0, :, 0].double() @ q[0, 0].double(), 0).item(), {}
for heads in (1, 2):  # the second is a copy of the first
    out, lse, parts = torch.empty(1, heads, 512).half(), torch.empty(1, heads), torch.empty(1, heads, 4, 513)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    given = (q.repeat(1, heads, 1), cache, cache[..., :512], out, lse, table, lengths, parts, 4, scale)
    kernel.decode_attention_fwd(*given, page_size=16, is_mla=True)
    off[heads] = abs(lse[0, 0].item() - want)
print(f"the LSE of one head is off by {off[1]:.1e} alone, and by {off[2]:.1e} beside another")
sys.exit(off[1] > 10 * off[2])
