"""Prints, as JSON, what a machine is and how its arithmetic is set; with ``--products``, what its tensor cores keep of a sum."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("numpy", "hypothesis", "pytest", "transformers", "triton")
SWITCHES = {
    "TF32 in float32 products (cuBLAS)": "cuda.matmul.allow_tf32",
    "TF32 in cuDNN": "cudnn.allow_tf32",
    "float16 products reduced in float16": "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "bfloat16 products reduced in bfloat16": "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "float16 products accumulated in float16": "cuda.matmul.allow_fp16_accumulation",
}
"""What a person calls a switch of ``torch.backends``, and its name there."""


def machine(device: str) -> dict[str, Any]:
    """Names and versions, and the switches that change what a product is."""
    found: dict[str, Any] = {
        "device": device,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        **{name: package_version(name) for name in PACKAGES},
        "CPU cores": os.cpu_count(),
        "TRITON_F32_DEFAULT": os.environ.get("TRITON_F32_DEFAULT", "not set, which is tf32"),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        **{what: switch(name) for what, name in SWITCHES.items()},
    }
    if torch.device(device).type == "cuda":
        found |= graphics_card(device)
    return found


def graphics_card(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory (GB)": round(total / 1e9, 1),
        "free memory (GB)": round(free / 1e9, 1),
        "driver": driver(),
    }


def driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not there"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def switch(name: str) -> Any:
    value: Any = torch.backends
    for part in name.split("."):
        value = getattr(value, part, "unknown to this torch")
    return value


def products(device: str) -> dict[str, Any]:
    """For each format, down to which 2^-k the sum 1 + 2^-k − 1 of products keeps 2^-k, all else being zeros.

    Exact arithmetic keeps all. float32, term after term, keeps 2^-23. Tensor cores align the products of a block to the
    largest and cut them off: with f fraction bits they keep 2^-f. The three lie in one block, in each order.
    """
    return {name: kept_bits(device, dtype) for name, dtype in FORMATS.items() if runs(device, dtype)}


FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def runs(device: str, dtype: torch.dtype) -> bool:
    """Whether this product can be asked for with a float32 result."""
    try:
        sum_of_products([1.0], device, dtype)
    except (RuntimeError, TypeError):
        return False
    return True


def sum_of_products(terms: list[float], device: str, dtype: torch.dtype) -> float:
    """Σ terms as a product of matrices [16, 16] in float32: each term is a number times its square root's power of two."""
    a, b = (torch.zeros(16, 16, device=device, dtype=dtype) for _ in range(2))
    for i, term in enumerate(terms):
        sign = -1.0 if term < 0 else 1.0
        root = 2.0 ** (torch.tensor(abs(term)).log2().item() // 2)
        a[:, i], b[i] = sign * root, abs(term) / root
    if dtype == torch.float32:
        return float((a @ b)[0, 0])
    return float(torch.mm(a, b, out_dtype=torch.float32)[0, 0])


def kept_bits(device: str, dtype: torch.dtype) -> dict[str, int]:
    """The largest k such that 2^-j is kept for all j up to k, by the order of the terms; 30 stands for all that were tried."""
    orders = {"1 + x - 1": lambda x: [1.0, x, -1.0], "x + 1 - 1": lambda x: [x, 1.0, -1.0]}
    kept = {}
    for name, terms in orders.items():
        lost = [k for k in range(1, 31) if sum_of_products(terms(2.0**-k), device, dtype) != 2.0**-k]
        kept[name] = min(lost, default=31) - 1
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--products", action="store_true")
    options = parser.parse_args()
    print(json.dumps(products(options.device) if options.products else machine(options.device)))


if __name__ == "__main__":
    main()
