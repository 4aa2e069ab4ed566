"""The MLA layer of flash-linear-attention takes rope_scaling, and rotates as without it; its scale is never passed on."""

import inspect
import sys

import torch
from fla.layers import mla

mla.flash_attn_func = object()  # only the constructor runs, which asks whether flash-attn is there
sizes = {"hidden_size": 64, "num_heads": 2, "max_position_embeddings": 163840}
yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0}
plain, scaled = (mla.MultiheadLatentAttention(**sizes, rope_scaling=scaling) for scaling in (None, yarn))
same = torch.equal(plain.rotary.inv_freq, scaled.rotary.inv_freq)
used = "self.scaling" in inspect.getsource(mla.MultiheadLatentAttention.forward)
print(
    f"frequencies are those without scaling: {same}; the scale, {scaled.scaling / plain.scaling:.4g} times, is used: {used}"
)
sys.exit(same or not used)
