"""A corpus of recorded calls: made, verified, made again with the same bytes, and held against a subject."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.exchange.sample import Sample
from mla_spec.front.cli import main
from mla_spec.golden.corpus import corpus, recorded
from mla_spec.golden.corpus.compare import COMPUTED
from mla_spec.golden.corpus.error import CorpusError
from tests.exchange.test_rows import CASES, whole

pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")

KERNEL = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel(TorchAbsorbed):
    def decode(self, *places, softmax_scale, **options):
        return super().decode(*places, softmax_scale=1.1 * softmax_scale, **options)
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calls of every kind that rows are taken of, and one that no corpus has."""
    folder = tmp_path_factory.mktemp("recorded") / "calls"
    kernel = mla_spec.record(TorchAbsorbed(), str(folder), rate=1)
    for name in CASES:
        operation, call = whole(name)
        places, options = call.arguments()
        getattr(kernel, operation.name)(*places, **options)
    kernel.merge(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    assert Sample.largest == Sample.whole
    return folder


@pytest.fixture(scope="module")
def made(calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of these calls."""
    folder = tmp_path_factory.mktemp("made") / "corpus"
    corpus.regenerate(folder, str(calls))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_corpus_has_the_calls_that_it_can_have(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["origin"] == "recorded calls"
    operations = sorted(case["operation"] for case in manifest["cases"])
    assert operations == [
        "decode",
        "ragged_decode",
        "ragged_decode",
    ]  # none with sinks or quantized pages, no sparse one
    assert {case["purpose"] for case in manifest["cases"]} == {recorded.EXACT}
    bounds = json.loads((made / "bounds.json").read_text(encoding="utf-8"))
    assert set(bounds["cases"]) == {case["name"] for case in manifest["cases"]}


def test_it_is_verified_and_made_again_with_the_same_bytes(made: Path, calls: Path) -> None:
    before = contents(made)
    assert "3 cases" in corpus.verify(made)
    assert corpus.regenerate(made) == "nothing changed"
    assert corpus.regenerate(made, str(calls)) == "nothing changed"
    assert contents(made) == before


def test_a_wrong_answer_is_found_and_mended(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, folder := tmp_path / "corpus")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = next(a for a in manifest["cases"][0]["arrays"] if a["name"] == "out")
    path = folder / entry["file"]
    data = bytearray(path.read_bytes())
    values: Any = np.frombuffer(bytes(data[-8:]), dtype="<f8") * (1 + 1e-9)
    data[-8:] = values.tobytes()
    path.write_bytes(bytes(data))
    with pytest.raises(CorpusError):
        corpus.verify(folder)
    length = 8 * int(np.prod(entry["shape"]))
    entry["sha256"] = corpus.arrays.sha256(bytes(data[-length:]))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="out"):
        corpus.verify(folder)
    assert set(corpus.regenerate(folder).splitlines()) == {f"changed {entry['file']}", "changed manifest.json"}
    assert contents(folder) == contents(made)


def test_large_answers_are_those_of_float64_and_say_so(
    made: Path, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "MOST", 0)
    corpus.regenerate(tmp_path / "corpus", str(calls))
    exact, plain = corpus.load(made), corpus.load(tmp_path / "corpus")
    assert {case.purpose for case in plain} == {recorded.FLOAT64}
    differ = 0
    for a, b in zip(exact, plain, strict=True):
        for found in COMPUTED[b.operation](b.inputs, b.parameters):
            want, got = a.expected[found.name], b.expected[found.name]
            np.testing.assert_array_equal(got, found.value)
            with np.errstate(invalid="ignore"):  # of two infinities
                assert ((np.abs(got - want) <= found.error) | (got == want)).all()
            differ += int((got != want).sum())
    assert differ
    corpus.verify(tmp_path / "corpus")
    assert corpus.regenerate(tmp_path / "corpus") == "nothing changed"


def test_subjects_are_held_against_it(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL, encoding="utf-8")
    assert main(["golden", "check", "torch-absorbed", "--dir", str(made)]) == 0
    assert main(["golden", "check", f"{tmp_path}/kernel.py:Kernel", "--dir", str(made)]) == 1
    assert "catches: whatever differs from what was recorded" in capsys.readouterr().out


def test_the_commands_of_the_page_do_what_it_says(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(mla-spec golden regenerate.*?)```", page, flags=re.DOTALL)
    shutil.copytree(calls, tmp_path / "recorded")
    (tmp_path / "my_kernel.py").write_text(KERNEL.replace("1.1 * ", ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        assert main(line.partition(" #")[0].split()[1:]) == 0


def test_what_cannot_be_a_corpus_is_said(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"), rate=1)
    kernel.merge(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    new = str(tmp_path / "new")
    assert main(["golden", "regenerate", "--dir", new, "--calls", str(tmp_path / "calls")]) == 1
    assert "holds no call of decode, ragged_decode" in capsys.readouterr().err
    assert main(["golden", "regenerate", "--dir", new, "--calls", str(tmp_path)]) == 1
    assert "holds no recorded calls" in capsys.readouterr().err
    assert not Path(new).exists()
    assert main(["golden", "verify", "--dir", str(made), "--calls", str(tmp_path)]) == 2
    assert main(["golden", "regenerate", "--calls", str(tmp_path)]) == 2
    assert "--calls is of golden regenerate, into the corpus that --dir names" in capsys.readouterr().err
