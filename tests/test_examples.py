"""Every example conforms as it stands, and a copy with one fault does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mla_spec.front.cli import main
from mla_spec.subjects.find import resolve_subject

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True)
class Example:
    """A subject of one file, and a fault: ``right`` becomes ``wrong``, which ``law`` finds.

    In ``quick`` dtypes, whose arithmetic is that of another one, a slow kernel runs the elementary laws alone.
    """

    subject: str
    right: str
    wrong: str
    law: str
    compiled: bool = False
    dtypes: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.subject.split(".")[0]

    @property
    def faulty_file(self) -> str:
        return f"{self.name}.cpp" if self.compiled else f"{self.name}.py"

    def built(self, folder: Path, *, faulty: bool) -> str:
        """A copy in ``folder``, ready to run; how the command names it."""
        for path in EXAMPLES.glob(f"{self.name}.*"):
            if path.suffix in (".py", ".cpp"):
                shutil.copy(path, folder)
        if faulty:
            replace_once(folder / self.faulty_file, self.right, self.wrong)
        if self.compiled:
            base = folder / self.name
            command = ["g++", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", f"{base}.so", f"{base}.cpp"]
            subprocess.run(command, check=True)
        return str(folder / self.subject)


def replace_once(path: Path, right: str, wrong: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{path.name} has {right!r} {text.count(right)} times"
    path.write_text(text.replace(right, wrong), encoding="utf-8")


ONE_FILE = [
    Example(
        "flash_mla_like.py:FlashMLALike",
        "out[i] * kept + p",
        "out[i] + p",
        "test_decode_agrees_with_reference",
        dtypes=("bfloat16",),
        quick=("float16",),
    ),
    Example(
        "cpp_decode.py:CppDecode",
        "t % page_size * kv_stride[1]",
        "t % page_size * d",
        "test_decode_reads_strides",
        compiled=True,
    ),
    Example(
        "latent_layer.py:LatentLayers",
        "triu(t - s + 1)",
        "triu(1)",
        "test_layer_decode_agrees_with_reference",
    ),
    Example(
        "fp8_cache.py:Fp8Cache",
        "rows.float() / tensor_scale",
        "rows.bfloat16().float() / tensor_scale",
        "test_codes_are_the_nearest",
    ),
]


@pytest.mark.parametrize("example", ONE_FILE, ids=lambda example: example.name)
def test_it_conforms(example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = example.built(tmp_path, faulty=False)
    asked = ["check", subject, "--examples", "2", "--seed", "0", "--jobs", "1"]
    named = [word for dtype in example.dtypes for word in ("--dtype", dtype)]
    assert main([*asked, *named]) == 0, capsys.readouterr().out
    for dtype in example.quick:
        assert main([*asked, "--quick", "--dtype", dtype]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("example", ONE_FILE, ids=lambda example: example.name)
def test_its_check_can_fail(example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = example.built(tmp_path, faulty=True)
    asked = ("--law", example.law, "--examples", "100", "--seed", "0", "-v", "--explain", "0", "--no-minimise")
    assert main(["check", subject, *asked, "--jobs", "1"]) == 1
    assert f"{example.law} [" in capsys.readouterr().out


def pytest_in(folder: Path, *chosen: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def adoption(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / "adoption", tmp_path / "adoption"))


def test_adoption_passes_with_its_waivers(adoption: Path) -> None:
    done = pytest_in(adoption)
    assert done.returncode == 0, done.stdout
    assert "2 xfailed" in done.stdout
    assert "warning" not in done.stdout


def test_adoption_fails_without_a_waiver(adoption: Path) -> None:
    replace_once(adoption / "waivers.toml", 'law = "test_decode_reads_strides"', 'law = "test_rope_reads_strides"')
    done = pytest_in(adoption, "-k", "reads_strides")
    assert done.returncode == 1, done.stdout
    assert "test_decode_reads_strides [in-house]: fail" in done.stdout


def test_adoption_fails_with_a_waiver_that_is_not_needed(adoption: Path) -> None:
    with (adoption / "waivers.toml").open("a") as file:
        file.write('\n[[waiver]]\nlaw = "test_decode_last_key_matters"\nreason = "none"\nexpires = 2099-12-31\n')
    done = pytest_in(adoption)  # all of it: a part of a run does not say that a waiver is not needed
    assert done.returncode == 1, done.stdout
    assert "the waiver of test_decode_last_key_matters is not needed" in done.stdout


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "ci" / "mla-spec.yml").read_text(encoding="utf-8"))


def steps(workflow: dict[str, Any]) -> list[str]:
    """The workflow's own commands, without the one that installs."""
    commands = [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step]
    assert commands.pop(0).startswith("pip install mla-spec")
    return commands


def run_steps(workflow: dict[str, Any], folder: Path) -> int:
    """The exit code of the workflow's commands on the kernel in ``folder``, with few examples."""
    assert set(workflow["env"]) == {"SUBJECT", "EXAMPLES", "SEED"}
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SUBJECT": workflow["env"]["SUBJECT"],
        "EXAMPLES": "2",
        "SEED": "1",
    }
    script = "\n".join(steps(workflow))
    return subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=env, capture_output=True, check=False
    ).returncode


@pytest.mark.parametrize(("faulty", "code"), [(False, 0), (True, 1)], ids=["conforms", "violates"])
def test_the_workflow_ends_as_the_check_does(workflow: dict[str, Any], tmp_path: Path, faulty: bool, code: int) -> None:
    kernel = tmp_path / "my_kernel.py"
    shutil.copy(EXAMPLES / "latent_layer.py", kernel)
    replace_once(kernel, "class LatentLayers:", "class Kernel:")
    if faulty:
        replace_once(kernel, "self.cache.element_size()", "self.cache.element_size() + 1")
    assert run_steps(workflow, tmp_path) == code
    uploaded = workflow["jobs"]["check"]["steps"][-1]["with"]["path"]
    assert (tmp_path / uploaded).stat().st_size > 0


def test_every_dtype_of_an_example_is_run() -> None:
    for example in ONE_FILE:
        if example.dtypes:
            declared = resolve_subject(str(EXAMPLES / example.subject)).supports.dtypes
            assert sorted(declared) == sorted(example.dtypes + example.quick)


def test_every_example_is_run() -> None:
    run = {f"{example.name}{suffix}" for example in ONE_FILE for suffix in (".py", ".cpp")}
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".cpp")}
    assert files <= run
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        "adoption",
        "ci",
        "exchange",
    }
