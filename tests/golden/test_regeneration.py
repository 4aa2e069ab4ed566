"""Regenerating the golden files gives the same bytes, and leaves the old ones when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_spec.golden.corpus import corpus, figures
from mla_spec.golden.corpus.corpus import CorpusError
from tests.golden.corpus_files import ARRAY, contents, edit_manifest

needs_flint = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('flint')", reason="python-flint")

WIDEST = "SkylakeX" if torch.cpu._is_avx512_supported() else "Haswell"
"""The kernels of BLAS with the widest vectors that this processor has."""

SETTINGS = [
    {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"},
    {"OPENBLAS_CORETYPE": "Sandybridge", "OPENBLAS_NUM_THREADS": "2"},
    {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"},
    {"OPENBLAS_CORETYPE": WIDEST, "LC_ALL": "C", "PYTHONUTF8": "0"},
    {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F X86_V3 X86_V4", "PYTHONHASHSEED": "1"},
]


@needs_flint
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
def test_regenerating_gives_the_same_bytes_under_any_setting(settings: dict[str, str], tmp_path: Path) -> None:
    new = tmp_path / "new"
    code = "import sys; from mla_spec.golden.corpus import corpus as c; c.regenerate(sys.argv[1]); print(c.verify(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(new)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the float64 reference agrees" in done.stdout
    assert contents(new) == contents(corpus.installed())
    assert sorted(p.name for p in new.iterdir()) == ["arrays", *sorted(["manifest.json", *figures.DOCUMENTS])]


@needs_flint
def test_regenerating_says_what_changed_and_heals_it(copy: Path) -> None:
    before = contents(copy)
    assert corpus.regenerate(copy) == "nothing changed"
    data = bytearray(before[ARRAY])
    data[-1] ^= 1
    (copy / ARRAY).write_bytes(bytes(data))
    (copy / "arrays/absorb.w_uk.npy").unlink()
    (copy / "arrays/stray.npy").write_bytes(b"")
    text = "added arrays/absorb.w_uk.npy\nchanged arrays/decode-paged.out.npy\nremoved arrays/stray.npy"
    assert corpus.regenerate(copy) == text
    assert contents(copy) == before


@needs_flint
@pytest.mark.parametrize(
    ("step", "error"),
    [
        *(("computing", error) for error in (RuntimeError, KeyboardInterrupt, OSError)),
        *zip(range(9), [RuntimeError, KeyboardInterrupt, OSError] * 3, strict=True),
    ],
)
def test_an_interrupted_regeneration_leaves_the_old_corpus(
    step: str | int, error: type[BaseException], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / ARRAY).unlink()  # so that there is something to replace
    before = contents(copy)
    rename, left = os.rename, [step]

    def failing_rename(source: Any, target: Any) -> None:
        if left[0] == 0:
            left[0] = -1  # moving back works
            raise error("stop")
        left[0] = int(left[0]) - 1
        rename(source, target)

    def failing_write(*args: Any) -> None:
        raise error("stop")

    if step == "computing":
        monkeypatch.setattr(figures, "DOCUMENTS", {**figures.DOCUMENTS, "cache_sizes.json": failing_write})
    else:
        monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(CorpusError if error is OSError else error):
        corpus.regenerate(copy)
    monkeypatch.undo()
    assert contents(copy) == before
    assert not (copy / ".regenerate").exists()


KILLED = """
import os, signal, sys
from mla_spec.golden.corpus import corpus, figures
step, rename, made = int(sys.argv[2]), os.rename, []

def killed_rename(source, target):
    if len(made) == step:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(source)
    rename(source, target)

def killed_write(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

os.rename = killed_rename
if step < 0:
    figures.DOCUMENTS["cache_sizes.json"] = killed_write
corpus.regenerate(sys.argv[1])
"""


@needs_flint
@pytest.mark.parametrize("step", [-1, 0, 3, 4, 6, 8])
def test_a_killed_regeneration_leaves_the_old_corpus(step: int, copy: Path) -> None:
    edit_manifest(copy, lambda m: m["cases"].reverse())  # a corpus that is valid and not the one to come
    before = contents(copy)
    done = subprocess.run([sys.executable, "-c", KILLED, str(copy), str(step)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (copy / ".regenerate").exists()
    corpus.load(copy)
    assert contents(copy) == before
    assert "changed manifest.json" in corpus.regenerate(copy)
    assert contents(copy) == contents(corpus.installed())
    assert not (copy / ".regenerate").exists()


@needs_flint
def test_a_first_regeneration_that_is_killed_can_be_repeated(tmp_path: Path) -> None:
    root = tmp_path / "new"
    for step in (0, 2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(step)], check=False)
        assert done.returncode == -signal.SIGKILL
    corpus.regenerate(root)
    assert contents(root) == contents(corpus.installed())


def test_regenerating_without_flint_names_the_extra(copy: Path) -> None:
    before = contents(copy)
    without = (
        "import sys; sys.modules['flint'] = None; from mla_spec.front.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for action, code in (("regenerate", 1), ("verify", 0)):
        command = [sys.executable, "-c", without, "golden", action, "--dir", str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code
        if code:
            text = "regenerating needs python-flint, which is not installed: pip install 'mla-spec[golden]'"
            assert done.stderr == f"mla-spec: {text}\n"
    assert contents(copy) == before


def test_regenerating_refuses_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays/mine.txt").write_text("keep")
    with pytest.raises(CorpusError, match=r"has arrays but no manifest\.json"):
        corpus.regenerate(tmp_path)
    with pytest.raises(CorpusError, match="cannot write the corpus in"):
        corpus.regenerate(tmp_path / "no" / "where")
    assert (tmp_path / "arrays/mine.txt").read_text() == "keep"
