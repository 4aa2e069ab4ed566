"""LitGPT's YaRN slows the pairs down that turn fast, and leaves the slow ones as they are: the paper has it the other way."""

import sys

import torch
from litgpt.model import build_rope_cache

# DeepSeek-V3: of 32 pairs the first turns 652 times in 4096 tokens, more than beta_fast; the last 0.08 times, less than beta_slow
yarn = {
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_seq_len": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
cos, sin = build_rope_cache(2, 64, base=10000, extra_config=yarn)
angle = torch.atan2(sin[1], cos[1])[:32]
fast, slow = angle[0].item(), angle[31].item() * 10000 ** (62 / 64)
print(f"times its plain frequency: first pair {fast:.4g} (want 1), last pair {slow:.4g} (want 1/40 = 0.025)")
sys.exit(abs(fast - 1) > 0.01)
