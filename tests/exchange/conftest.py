"""The examples in C++ and C, built once; tests that need a compiler are skipped where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "exchange"
STRICT = ["-Wall", "-Wextra", "-Werror"]


def built(folder: Path, source: str = "client.cpp", right: str = "", wrong: str = "") -> str:
    """The program of an example, with ``right`` replaced by ``wrong``; such a copy is compiled fast, not to be fast."""
    compiler, *options = ["g++", "-std=c++17"] if source.endswith(".cpp") else ["gcc", "-std=c99"]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    text = (EXAMPLES / source).read_text(encoding="utf-8")
    assert not right or text.count(right) == 1, f"{source} has {right!r} {text.count(right)} times"
    copy, program = folder / source, folder / Path(source).stem
    copy.write_text(text.replace(right, wrong) if right else text, encoding="utf-8")
    level = "-O0" if right else "-O2"
    command = [compiler, *options, level, *STRICT, f"-I{EXAMPLES}", "-o", str(program), str(copy), "-lm"]
    subprocess.run(command, check=True)
    return str(program)


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The client in C++ as it stands."""
    return built(tmp_path_factory.mktemp("client"))
