"""A real tool under which a kernel of C++ runs: what no value shows is a verdict, with its smallest case."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mla_spec.front.cli import main
from mla_spec.operations.all import parse_case
from mla_spec.operations.decode import DecodeCase
from mla_spec.subjects.output import Output
from mla_spec.subjects.process import SubjectProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
LAW = "test_decode_agrees_with_reference"
SOFTMAX = "        for (float &x : p) sum += x = std::exp(x - m);\n"
PAIRS = """
        for (int64_t t = 0; t < keys; t += 2) {  // the second of a pair is loaded before it is known to be there
            const float pair[] = {p[t], *(volatile float *)&p[t + 1]};
            for (int64_t i = 0; i < std::min<int64_t>(2, keys - t); i++) sum += p[t + i] = std::exp(pair[i] - m);
        }
"""


def sanitizer() -> str:
    """The path of the library that has to be loaded before Python; "" where the compiler has none."""
    if shutil.which("g++") is None:
        return ""
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    return str(Path(found.strip()).resolve()) if Path(found.strip()).is_absolute() else ""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example, with scratch memory of just the size of a row, of which an odd row is read beyond its end."""
    if not sanitizer():
        pytest.skip("there is no g++ with AddressSanitizer here")
    folder = tmp_path_factory.mktemp("under")
    source = (EXAMPLES / "cpp_decode.cpp").read_text()
    for old, new in (
        (SOFTMAX, PAIRS),
        ("    std::vector<float> p;\n", ""),
        ("p.resize(keys)", "std::vector<float> p(keys)"),
    ):
        assert old in source
        source = source.replace(old, new)
    (folder / "cpp_decode.cpp").write_text(source)
    shutil.copy(EXAMPLES / "cpp_decode.py", folder)
    command = ["g++", "-O1", "-g", "-fsanitize=address", "-fsanitize-recover=address", "-shared", "-fPIC", "-o"]
    subprocess.run([*command, str(folder / "cpp_decode.so"), str(folder / "cpp_decode.cpp")], check=True)
    return f"{folder}/cpp_decode.py:CppDecode"


def record(kernel: str, out: Path, options: str, *more: str) -> dict[str, str]:
    under = f"env LD_PRELOAD={sanitizer()} ASAN_OPTIONS=detect_leaks=0:{options}"
    line = ["check", kernel, "--law", LAW, "--examples", "6", "--seed", "0", "--jobs", "1", "--explain", "0"]
    main([*line, "--under", under, "--json", str(out), *more])
    (found,) = json.loads(out.read_text())
    return dict(found)


@pytest.fixture(scope="module")
def ended(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The record of the first case that fails, as it is: the sanitizer ends the process."""
    return record(kernel, tmp_path_factory.mktemp("ended") / "out.json", "halt_on_error=1", "--no-minimise")


def rows_of(found: dict[str, str]) -> int:
    """Of scores, in the case of a record."""
    case = parse_case(found["case"])
    assert isinstance(case, DecodeCase)
    return sum(case.seqlens) * case.s * case.num_heads


def test_what_a_sanitizer_reports_fails_the_smallest_case(kernel: str, ended: dict[str, str], tmp_path: Path) -> None:
    found = record(kernel, tmp_path / "out.json", "halt_on_error=0", "--minimise-seconds", "10")
    first, *_, last = found["message"].splitlines()
    assert found["verdict"] == "fail"
    assert first.startswith("libasan.so") and "reports: ERROR: AddressSanitizer: heap-buffer-overflow" in first
    assert last.startswith("SUMMARY: AddressSanitizer: heap-buffer-overflow") and last.endswith(" in decode")
    assert rows_of(found) <= rows_of(ended)
    assert f"--under 'env LD_PRELOAD={sanitizer()}" in found["replay"]


def test_the_documented_lines(kernel: str) -> None:
    page = (EXAMPLES.parent / "docs" / "trust.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)\n```", page.partition("## Under a tool")[2], re.S)
    line = f"set -e\n{block} --examples 2 --seed 0 --jobs 1 --explain 0 --no-minimise"
    scripts = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    command = ["bash", "-c", line]
    run = subprocess.run(command, cwd=Path(kernel).parent, env=scripts, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "reports: ERROR: AddressSanitizer: heap-buffer-overflow" in " ".join(run.stdout.split())


def test_a_sanitizer_that_ends_the_process_is_told(ended: dict[str, str]) -> None:
    assert ended["verdict"] == "crashed"
    assert "the process ended with exit code 1\nit runs under a tool that reports:\n" in ended["message"]
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in ended["message"]


def test_no_value_shows_it(kernel: str, tmp_path: Path) -> None:
    found = record(kernel, tmp_path / "out.json", "halt_on_error=0:report_globals=0:log_path=/dev/null")
    assert found["verdict"] == "pass"


@pytest.mark.parametrize(
    ("printed", "reported"),
    [
        ("==7== Invalid read of size 4", "Invalid read of size 4"),
        ("=====\n==7==ERROR: AddressSanitizer: heap-use-after-free", "ERROR: AddressSanitizer: heap-use-after-free"),
        ("k.cpp:3:5: runtime error: signed integer overflow", "k.cpp:3:5: runtime error: signed integer overflow"),
        ("WARNING: ThreadSanitizer: data race (pid=9)", "WARNING: ThreadSanitizer: data race (pid=9)"),
        ("========= ERROR SUMMARY: 0 errors\n==7==\nwhat a subject prints", ""),
    ],
)
def test_what_is_a_report(printed: str, reported: str) -> None:
    output = Output()
    output.add(printed.encode())
    assert output.reported() == reported


@pytest.mark.parametrize(
    ("under", "says"),
    [
        ("'", "cannot be read as a command: No closing quotation"),
        ("no-such-tool -q", "there is no program 'no-such-tool'"),
    ],
)
def test_a_tool_that_is_not_there_is_a_usage_error(under: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "torch-absorbed", "--law", LAW, "--seed", "0", "--under", under]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("under", "tool"),
    [
        ("compute-sanitizer --tool memcheck", "compute-sanitizer"),
        ("env PYTHONMALLOC=malloc /usr/bin/valgrind -q", "valgrind"),
        ("env LD_PRELOAD=/usr/lib/libasan.so.8 ASAN_OPTIONS=detect_leaks=0", "libasan.so.8"),
        ("env MALLOC_PERTURB_=1", "env"),
    ],
)
def test_a_tool_has_a_name(under: str, tool: str) -> None:
    assert SubjectProcess("torch-absorbed", under=under).tool == tool
