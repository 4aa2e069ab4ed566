"""What the lane runs, most valuable first, as data."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHIPPED = ("torch-explicit", "torch-absorbed", "torch-sdpa")
DECODE = "test_decode_agrees_with_reference"
PREFILL = "test_prefill_agrees_with_reference"
MERGE = "test_merge_agrees_with_reference"
GRAPH = "test_decode_is_replayed_in_a_cuda_graph"
STATISTICS = (
    "test_decode_output_is_unbiased",
    "test_decode_lse_is_unbiased",
    "test_decode_error_is_as_small_as_declared",
)
REHEARSAL_LIMIT = 300.0
TF32 = "products in TF32, which the profiles of these subjects do not declare"


@dataclass(frozen=True)
class Setting:
    """How the lane was called.

    Attributes:
        device: of the tensors.
        brought: folder of third-party files; it need not exist.
        jobs: worker processes.
        rehearse: whether counts are small, and laws few.
    """

    device: str
    brought: Path
    jobs: int
    rehearse: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Step:
    """One command of the lane.

    Attributes:
        name: of the step, in results.
        title: what it shows.
        command: the program and its arguments.
        limit: seconds it may take.
        environment: variables that it gets besides those of the lane.
        expected: why violations of it are no news; empty where they are.
        left_out: why it cannot run here; empty where it can.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    expected: str = ""
    left_out: str = ""


def program(name: str, *arguments: str) -> tuple[str, ...]:
    """A script of this folder."""
    return sys.executable, str(HERE / name), *arguments


def mla_spec(command: str, *arguments: str) -> tuple[str, ...]:
    """The command ``mla-spec``, which is not installed."""
    return sys.executable, "-m", "mla_spec.front.cli", command, *arguments


def named(option: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """An option given once for each of the names."""
    return tuple(part for name in names for part in (option, name))


def subject(file: str, name: str) -> str:
    return f"{(HERE / file).relative_to(ROOT)}:{name}"


def check(
    setting: Setting,
    subjects: tuple[str, ...],
    *,
    laws: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    examples: int = 60,
    more: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """``mla-spec check``; a rehearsal has two examples of each law, and one process where laws are named."""
    alone = ("--in-process",) if setting.rehearse and laws else ()
    return mla_spec(
        "check",
        *subjects,
        *named("--law", laws),
        *named("--dtype", dtypes),
        *("--device", setting.device, "--jobs", str(setting.jobs), "--timeout", "60"),
        *("--examples", "2" if setting.rehearse else str(examples)),
        *("--seed", "0", "--explain", "0"),  # the same cases each time; what may explain a failure is asked for later
        *alone,
        *more,
    )


def steps(setting: Setting) -> list[Step]:
    """Every step, in the order of its value. A rehearsal is short, and leaves a busy machine time."""
    every = _steps(setting)
    return [replace(step, limit=REHEARSAL_LIMIT) for step in every] if setting.rehearse else every


def _steps(setting: Setting) -> list[Step]:
    return [
        Step("machine", "The machine", program("machine.py", "--device", setting.device), 60),
        _shipped(setting),
        _graphs(setting),
        _tests(setting),
        _torch_kernels(setting),
        *_triton(setting),
        *_tf32(setting),
        _products(setting),
        _statistics(setting),
        _selftest(setting),
        _sensitivity(setting),
        _flashinfer(setting),
    ]


def _shipped(setting: Setting) -> Step:
    compiler = ("--compile", "eager" if setting.rehearse else "inductor")
    subjects = (subject("torch_kernels.py", "Narrow"),) if setting.rehearse else SHIPPED
    return Step(
        "shipped", "Shipped subjects, every law, with torch.compile", check(setting, subjects, more=compiler), 180
    )


def _graphs(setting: Setting) -> Step:
    return Step(
        "cuda-graphs",
        "A decode that is captured in a CUDA graph",
        check(setting, ("mla_spec.planted_bugs.state:Capturable",), laws=(GRAPH,), examples=40),
        40,
        left_out="" if setting.on_gpu else "needs CUDA",
    )


def _tests(setting: Setting) -> Step:
    """What only a GPU can show of the suite itself; its tests skip themselves elsewhere."""
    arguments = ("-q", "-rs", "-p", "no:cacheprovider", "tests/gpu/test_cuda.py")
    return Step("tests", "Tests that need CUDA", (sys.executable, "-m", "pytest", *arguments), 75)


def _torch_kernels(setting: Setting) -> Step:
    kernels = ("SDPAFlash", "SDPAEfficient", "SDPACudnn", "SDPAMath", "Flex")
    if not setting.on_gpu:  # a CPU has no others
        kernels = ("SDPAFlash", "SDPAMath", "Flex")
    laws = (DECODE, PREFILL) if setting.rehearse else ()
    names = tuple(subject("torch_kernels.py", kernel) for kernel in kernels)
    return Step("torch-kernels", "PyTorch's own attention kernels", check(setting, names, laws=laws), 120)


def _triton(setting: Setting) -> list[Step]:
    kernels = ("VllmDecode", "SglangDecode", "SglangExtend", "VllmMerge")
    names = tuple(subject("triton_kernels.py", kernel) for kernel in kernels)
    laws = (DECODE, MERGE) if setting.rehearse else ()
    absent = triton_missing(setting)

    def step(name: str, title: str, dtypes: tuple[str, ...], precision: str, expected: str = "") -> Step:
        return Step(
            f"triton-{name}",
            f"Triton kernels of vLLM and SGLang, {title}",
            check(setting, names, dtypes=dtypes, laws=laws, examples=40),
            75,
            {"TRITON_F32_DEFAULT": precision} | ({} if setting.on_gpu else {"TRITON_INTERPRET": "1"}),
            expected,
            absent,
        )

    # The interpreter multiplies the bit patterns of bfloat16.
    half = ("bfloat16", "float16") if setting.on_gpu else ("float16",)
    return [
        step("half", "16 bits", half, "ieee"),
        step("float32", "float32 without TF32", ("float32",), "ieee"),
        step("tf32", "float32 with TF32", ("float32",), "tf32", TF32 if setting.on_gpu else ""),
    ]


def triton_missing(setting: Setting) -> str:
    """Why the Triton kernels cannot run; "" where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    needed = ("vllm/v1/attention/ops", "sglang/kernels/ops/attention")
    absent = [name for name in needed if not (setting.brought / name).is_dir()]
    return f"not brought along: {', '.join(absent)} (tests/gpu/collect.py does it)" if absent else ""


def _tf32(setting: Setting) -> list[Step]:
    """The same subject with cuBLAS's products in float32, and in TF32."""
    subjects = ("torch-absorbed", subject("torch_kernels.py", "SDPAMath"))
    return [
        Step(
            name,
            title,
            check(setting, subjects, laws=(DECODE, PREFILL), dtypes=("float32",), examples=20),
            40,
            {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": value},
            TF32 if value == "1" and setting.on_gpu else "",
        )
        for name, title, value in (
            ("cublas-float32", "float32 products of PyTorch without TF32", "0"),
            ("cublas-tf32", "float32 products of PyTorch with TF32", "1"),
        )
    ]


def _products(setting: Setting) -> Step:
    """What the tensor cores keep, beside what the profiles of 16-bit kernels declare."""
    return Step(
        "products",
        "Fraction bits that products keep",
        program("machine.py", "--products", "--device", setting.device),
        40,
    )


def _statistics(setting: Setting) -> Step:
    kernels = ("SDPAMath",) if setting.rehearse else ("SDPAFlash", "SDPAEfficient", "SDPACudnn")
    names = tuple(subject("torch_kernels.py", kernel) for kernel in kernels)
    dtypes = ("float16",) if setting.rehearse else ()
    laws = STATISTICS[:1] if setting.rehearse else STATISTICS
    return Step("statistics", "Statistics of real tensor cores", check(setting, names, laws=laws, dtypes=dtypes), 60)


def _selftest(setting: Setting) -> Step:
    bugs = ("G17",) if setting.rehearse else ()
    common = ("--quick", "--device", setting.device, "--jobs", str(setting.jobs), "--timeout", "60")
    return Step("selftest", "Planted bugs", mla_spec("selftest", *common, *named("--bug", bugs)), 120)


def _sensitivity(setting: Setting) -> Step:
    name = subject("torch_kernels.py", "Narrow") if setting.rehearse else "torch-absorbed"
    dtypes = ("bfloat16",)
    cases = "1" if setting.rehearse else "4"
    laws = (DECODE,) if setting.rehearse else ()
    arguments = (name, "--device", setting.device, "--cases", cases, *named("--dtype", dtypes), *named("--law", laws))
    return Step("sensitivity", "The smallest faults that are found", mla_spec("sensitivity", *arguments), 60)


def _flashinfer(setting: Setting) -> Step:
    return Step(
        "flashinfer",
        "FlashInfer's MLA wrapper",
        check(setting, (subject("flashinfer_kernel.py", "FlashInferMLA"),), laws=(DECODE,), examples=20),
        120,
        left_out=flashinfer_missing(setting),
    )


def flashinfer_missing(setting: Setting) -> str:
    """Why FlashInfer cannot run; "" where it can."""
    if not setting.on_gpu:
        return "needs CUDA"
    if find_spec("flashinfer") is None and not list(setting.brought.glob("flashinfer_python-*.whl")):
        return "not installed and not brought along (tests/gpu/collect.py --flashinfer does it)"
    return ""


def default_jobs(device: str) -> int:
    """Two on a CPU, where the tests share it; half of the cores beside a GPU."""
    return 2 if not device.startswith("cuda") else max(2, min(8, (os.cpu_count() or 2) // 2))
