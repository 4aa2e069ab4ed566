"""A failing case as a script, run against the wrong kernel and an honest one."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mla_spec.front.case_script import LONGEST
from mla_spec.front.cli import main

KERNEL = """
import torch

class Kernel:
    # softmax_scale is that of the width of q in Wrong
    def decode(self, q, kv_cache, block_table, cache_seqlens, *, head_dim_v, softmax_scale, causal):
        out, lse = torch.zeros_like(q[..., :head_dim_v]), torch.full(q.shape[:3], float("-inf"))
        for i, length in enumerate(cache_seqlens.tolist()):
            token = torch.arange(length)
            rows = kv_cache[block_table[i, token // kv_cache.shape[1]].long(), token % kv_cache.shape[1], 0].double()
            for j in range(q.shape[1] if length else 0):
                seen = length - (q.shape[1] - 1 - j if causal else 0)
                scores = q[i, j].double() @ rows[: max(seen, 0)].T * self.scale(q, softmax_scale)
                if seen > 0:
                    out[i, j] = (torch.softmax(scores, -1) @ rows[:seen, :head_dim_v]).to(q.dtype)
                    lse[i, j] = torch.logsumexp(scores, -1).float()
        return out, lse.transpose(1, 2)

    def scale(self, q, softmax_scale):
        return softmax_scale

class Wrong(Kernel):
    def scale(self, q, softmax_scale):
        return q.shape[-1] ** -0.5
"""

SHIPPED = """
import torch
from mla_spec.adapters.pytorch import TorchAbsorbed

OPERATION = "{operation}"

def called(self, *arguments, **options):
    given = getattr(TorchAbsorbed(), OPERATION)(*arguments, **options)
    if not self.wrong:
        return given
    if given is None:
        arguments[2].mul_(2)
        return None
    if isinstance(given, tuple):
        return (given[0] * 2, *given[1:])
    return (given.float() + 1).to(given.dtype)

Kernel = type("Kernel", (), {{OPERATION: called, "wrong": False, "supports": TorchAbsorbed.supports}})
Wrong = type("Wrong", (), {{OPERATION: called, "wrong": True, "supports": TorchAbsorbed.supports}})
"""

LAWS = {
    "decode": "test_decode_agrees_with_reference",
    "prefill": "test_prefill_agrees_with_reference",
    "rope": "test_rope_agrees_with_reference",
    "merge": "test_merge_agrees_with_reference",
    "sparse_decode": "test_sparse_decode_agrees_with_reference",
    "dequantize_weight": "test_dequantised_weight_is_code_times_scale_of_its_block",
}


def found(folder: Path, law: str, *options: str, name: str = "kernel") -> str:
    """The script of the smallest case of a law that fails."""
    path = folder / "repro.py"
    subject = f"{folder / f'{name}.py'}:Wrong"
    assert (
        main(
            [
                "check",
                subject,
                "--law",
                law,
                "--examples",
                "20",
                "--seed",
                "0",
                "--dtype",
                "float32",
                "--jobs",
                "1",
                *options,
                "--export",
                str(path),
            ]
        )
        == 1
    )
    return path.read_text()


def outcome(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of a script, in this process."""
    path = folder / "run.py"
    path.write_text(text)
    capsys.readouterr()
    before = list(sys.path)
    sys.modules.pop("kernel", None)  # that of another test
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.path[:] = before
        sys.modules.pop("kernel", None)
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_script_needs_torch_and_the_kernel_alone(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    text = found(tmp_path, "test_decode_agrees_with_reference")
    assert len(text.splitlines()) <= LONGEST
    assert "float64" in text
    (tmp_path / "mla_spec.py").write_text("raise ImportError('mla-spec is not here')")
    for name, code in (("Wrong", 1), ("Kernel", 0)):
        (tmp_path / "run.py").write_text(text.replace("Wrong", name))
        done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert ("0 elements are wrong" in done.stdout) == (name == "Kernel")


@pytest.mark.parametrize("operation", LAWS)
def test_the_script_tells_right_from_wrong(operation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel.py").write_text(SHIPPED.format(operation=operation))
    text = found(tmp_path, LAWS[operation], "--in-process")
    assert len(text.splitlines()) <= LONGEST
    code, out = outcome(text, tmp_path, capsys)
    assert code == 1
    assert ": got " in out
    assert outcome(text.replace("Wrong", "Kernel"), tmp_path, capsys) == (0, "0 elements are wrong\n")


def test_explain_exports_the_case_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    path, case = tmp_path / "repro.py", "decode:dtype=bfloat16,seqlens=3+2,num_heads=2,kv_lora_rank=2,page_size=2"
    assert main(["explain", case, f"{tmp_path / 'kernel.py'}:Wrong", "--export", str(path)]) == 1
    text = path.read_text()
    assert case in text
    assert outcome(text, tmp_path, capsys)[0] == 1
    assert outcome(text.replace("Wrong", "Kernel"), tmp_path, capsys)[0] == 0


@pytest.mark.parametrize(
    ("subject", "law", "why"),
    [
        ("{kernel}:Kernel", "test_decode_agrees_with_reference", "no law fails"),
        ("{kernel}:Aliased", "test_decode_output_is_not_aliased", "does not compare one call with the exact result"),
    ],
)
def test_why_there_is_no_script_is_said(
    subject: str, law: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aliased = """
class Aliased(Kernel):
    buffers = {}

    def decode(self, *arguments, **options):
        out, lse = super().decode(*arguments, **options)
        return self.buffers.setdefault((tuple(out.shape), out.dtype), out).copy_(out), lse
"""
    (tmp_path / "kernel.py").write_text(KERNEL + aliased)
    path = tmp_path / "repro.py"
    spec = subject.format(kernel=tmp_path / "kernel.py")
    asked = ("--law", law, "--examples", "8", "--seed", "0", "--dtype", "float32", "--in-process")
    main(["check", spec, *asked, "--export", str(path)])
    assert "mla-spec: --export: nothing is written: " in (error := capsys.readouterr().err)
    assert why in error
    assert not path.exists()


def test_a_case_of_many_numbers_is_left_to_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    path, case = tmp_path / "repro.py", "decode:dtype=float32,seqlens=900,kv_lora_rank=8,page_size=64"
    assert main(["explain", case, f"{tmp_path / 'kernel.py'}:Wrong", "--export", str(path)]) == 1
    assert "`mla-spec dump` writes them to a file" in capsys.readouterr().err
    assert not path.exists()


def test_export_is_of_one_subject(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "repro.py")
    assert main(["check", "torch-absorbed", "torch-sdpa", "--export", path]) == 2
    assert capsys.readouterr().err == "mla-spec: --export is of one SUBJECT, got 2\n"
    assert main(["check", "torch-absorbed", "--export", str(tmp_path / "no" / "x.py")]) == 2
