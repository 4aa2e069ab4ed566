"""flex_attention, not compiled, raises where there is no key; scaled_dot_product_attention gives zeros."""

import sys

import torch
from torch.nn.attention.flex_attention import flex_attention

q, none = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 0, 8)
print(
    "scaled_dot_product_attention:", torch.nn.functional.scaled_dot_product_attention(q, none, none).unique().tolist()
)
try:
    print("flex_attention:", flex_attention(q, none, none).unique().tolist())
except IndexError as error:
    print("flex_attention:", error)
    sys.exit(1)
