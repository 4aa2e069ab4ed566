"""Programs that answer calls: the examples conform through a pipe and by files, and what is wrong with a program is a verdict."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_spec.exchange.contents import ContentsSubject
from mla_spec.exchange.declared import Declared
from mla_spec.exchange.folder import CALLS
from mla_spec.exchange.program import Program
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import CALLED
from mla_spec.subjects.find import resolve_subject
from mla_spec.subjects.signature import Signature
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import SubjectCrashed
from tests.exchange.conftest import built

OFFERED = ("rope", "prefill", "decode", "merge", "write_cache")


def checked(command: str, out: Path, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    line = ["check", "--command", command, "--seed", "0", "--jobs", "1", "--explain", "0", "--json", str(out)]
    code = main([*line, *options])
    return code, {record["law"]: record for record in json.loads(out.read_text(encoding="utf-8"))}


def by_files(command: str, folder: Path, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The records of ``judge`` on what a program answers, round after round."""
    assert main(["export", str(folder), "--subject", f"command:{command}", "--seed", "0", *options]) == 0
    known = -1
    while known != (known := len(list((folder / CALLS).iterdir()))):
        subprocess.run([*shlex.split(command), str(folder)], check=True)
        assert main(["export", str(folder)]) == 0
    out = folder.parent / "judged.json"
    code = main(["judge", str(folder), "--in-process", "--json", str(out)])
    return code, {record["law"]: record for record in json.loads(out.read_text(encoding="utf-8"))}


def require_judged(found: dict[str, dict[str, Any]], live: tuple[str, ...]) -> None:
    """Every law of the operations passes, or needs what is not there, or is not of these operations at all."""
    for name, record in found.items():
        law = all_laws()[name]
        absent = not set(law.needs) <= set(OFFERED) or any(
            word in name for word in ("backward", "gradient", "under_load")
        )
        undeclared = bool(law.missing(Supports()))  # an option that is not taken for granted
        want = "unsupported" if absent or undeclared or law.live in live else "pass"
        assert record["verdict"] == want, f"{name}: {record['message']}"


def test_the_example_passes_through_a_pipe(client: str, tmp_path: Path) -> None:
    code, found = checked(client, tmp_path / "out.json", "--examples", "2")
    assert code == 0
    require_judged(found, ("tensors",))


def test_the_example_passes_by_files(client: str, tmp_path: Path) -> None:
    code, found = by_files(client, tmp_path / "calls", "--examples", "2", "--dtype", "float32")
    assert code == 0
    require_judged(found, ("tensors", "calls"))


def test_the_example_in_c_passes(tmp_path: Path) -> None:
    code, found = checked(built(tmp_path, "client.c"), tmp_path / "out.json", "--examples", "8")
    assert code == 0
    assert sum(record["verdict"] == "pass" for record in found.values()) >= 8


@dataclass(frozen=True)
class Fault:
    """What is wrong in a copy of the example, and the law that finds it."""

    right: str
    wrong: str
    law: str


FAULTS = [
    Fault("sum += x = std::exp(x - m)", "sum += x = std::exp2(x - m)", "test_decode_agrees_with_reference"),
    Fault("*lse = m + std::log(sum);", "*lse = m + std::log2(sum);", "test_decode_lse_agrees_with_reference"),
    Fault("length - s + j + 1 : length", "length - s + j : length", "test_decode_agrees_with_reference"),
    Fault("? t - s + j + 1 : t", "? std::min(j + 1, t) : t", "test_prefill_agrees_with_reference"),
    Fault("in_lse = (i * h + k) * s + j;", "in_lse = in_out;", "test_merge_agrees_with_reference"),
    Fault("[row / (rows / tokens)]", "[row % tokens]", "test_rope_agrees_with_reference"),
    Fault("if (slot < 0) continue;", "if (slot <= 0) continue;", "test_write_cache_stores_latent_then_rope"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.wrong)
def test_a_fault_is_found_both_ways(fault: Fault, tmp_path: Path) -> None:
    program = built(tmp_path, right=fault.right, wrong=fault.wrong)
    options = ["--law", fault.law, "--examples", "40", "--dtype", "float32"]
    code, found = checked(program, tmp_path / "out.json", *options)
    assert (code, found[fault.law]["verdict"]) == (1, "fail")
    assert main([*shlex.split(found[fault.law]["replay"])[1:], "--explain", "0", "--in-process"]) == 1
    code, found = by_files(program, tmp_path / "calls", *options)
    assert (code, found[fault.law]["verdict"]) == (1, "fail")


def test_state_between_calls_is_found_through_a_pipe(tmp_path: Path) -> None:
    wrong = "static int64_t first = call[\"cache_seqlens\"].as<int32_t>()[0];\n        const int64_t length = i ? seqlens.as<int32_t>()[i] : std::min<int64_t>(first, width * page_size);"  # fmt: skip
    program = built(tmp_path, right="const int64_t length = seqlens.as<int32_t>()[i];", wrong=wrong)
    law = "test_decode_calls_are_independent"
    assert checked(program, tmp_path / "out.json", "--law", law, "--no-minimise")[1][law]["verdict"] == "fail"


def test_other_bits_are_found_through_a_pipe(tmp_path: Path) -> None:
    wrong = "*lse = m + std::log(sum) + (std::rand() % 2 ? 1e-6f : 0);"
    program = built(tmp_path, right="*lse = m + std::log(sum);", wrong=wrong)
    law = "test_decode_gives_the_same_bits_again"
    assert checked(program, tmp_path / "out.json", "--law", law, "--no-minimise")[1][law]["verdict"] == "fail"


def test_a_crash_is_a_verdict_and_made_smaller(tmp_path: Path) -> None:
    right = "const int64_t b = q.shape[0], s = q.shape[1], h = q.shape[2], d = q.shape[3], page_size = cache.shape[1];"
    wrong = f'{right}\n    if (s > 1) {{ std::fputs("two queries\\n", stderr); std::abort(); }}'
    program = built(tmp_path, right=right, wrong=wrong)
    law = "test_decode_agrees_with_reference"
    code, found = checked(program, tmp_path / "out.json", "--law", law, "--dtype", "float32", "--examples", "40")
    record = found[law]
    assert (code, record["verdict"]) == (1, "crashed")
    assert "was killed by SIGABRT before it answered" in record["message"]
    assert "two queries" in record["message"]
    assert re.search(r"\bs=2\b", record["case"])


def test_a_hang_is_a_verdict(tmp_path: Path) -> None:
    right = "Message decode(const Message &call) {"
    program = built(tmp_path, right=right, wrong=f"{right}\n    for (volatile int x = 0;; x = x + 1) {{}}")
    law = "test_decode_agrees_with_reference"
    options = ["--law", law, "--dtype", "float32", "--examples", "2", "--timeout", "1"]
    code, found = checked(program, tmp_path / "out.json", *options)
    assert (code, found[law]["verdict"]) == (1, "crashed")
    assert "did not return within 1 s" in found[law]["message"]


def script(folder: Path, body: str) -> str:
    path = folder / "program"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("print('ready to serve', flush=True)", "wrote to its standard output what is no answer"),
        ("sys.exit(3)", "ended with exit code 3 before it answered"),
        ("raise ValueError('no device')", "ValueError: no device"),
        ("sys.stdout.buffer.write((3).to_bytes(8, 'little') + b'abc'); sys.stdout.flush()", "is no safetensors file"),
    ],
)
def test_a_program_that_does_not_begin_is_a_usage_error(
    body: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--command", script(tmp_path, body), "--jobs", "1"]) == 2
    assert says in capsys.readouterr().err


def test_what_it_declares_is_read_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = """
header = b'{"__metadata__":{"operations":"decode","supports":"{\\\\"dtypes\\\\": [\\\\"float31\\\\"]}"}}'
answer = len(header).to_bytes(8, "little") + header
sys.stdout.buffer.write(len(answer).to_bytes(8, "little") + answer); sys.stdout.flush(); sys.stdin.read()
"""
    assert main(["check", "--command", script(tmp_path, body), "--jobs", "1"]) == 2
    error = capsys.readouterr().err
    assert "dtypes has unknown value 'float31'" in error
    assert error.count("\n") == 1


def test_a_program_starts_again_after_its_end(tmp_path: Path) -> None:
    program = Program(script(tmp_path, "sys.stdout.buffer.write((2).to_bytes(8, 'little') + b'ab')"))
    for _ in range(2):
        assert program.ask(b"x") == b"ab"
        with pytest.raises(SubjectCrashed, match="ended with exit code 0"):
            program.ask(b"x")


class Spy:
    """Torch-absorbed, of which a pipe sees contents alone: it notes tensors that are not dense, or not their own memory."""

    def __init__(self) -> None:
        self.subject, self.seen, self.odd = resolve_subject("torch-absorbed"), set[int](), False
        self.name, self.profile, self.supports = "spy", self.subject.profile, Supports(backward=())
        for operation in CALLED:
            setattr(self, operation.name, self._noted(operation))

    def _noted(self, operation: Signature) -> Any:
        def call(*places: Any, **options: Any) -> Any:
            for x in [*places, *options.values()]:
                for tensor in x.values() if isinstance(x, dict) else [x]:
                    if isinstance(tensor, torch.Tensor):
                        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                        self.odd |= not (tensor.is_contiguous() and whole)
            return getattr(self.subject, operation.name)(*places, **options)

        return call


def of_contents() -> list[str]:
    names = {operation.name for operation in CALLED}
    large = re.compile("production_counts|at_length|under_load|light_keys|golden|unbiased|declared")  # slow, and alike
    return [
        name for name, law in all_laws().items() if set(law.needs) <= names and not law.live and not large.search(name)
    ]


@pytest.mark.parametrize("name", of_contents())
def test_a_law_of_contents_passes_no_views(name: str) -> None:
    """So a law that does has to say that it is ``live``: through a pipe it would pass whatever a subject does with strides."""
    spy = Spy()
    run_law(all_laws()[name], spy, Options(examples=1, dtypes=("float32",), minimise=False))
    assert not spy.odd


def test_a_law_of_views_is_seen() -> None:
    spy = Spy()
    run_law(all_laws()["test_rope_reads_strides"], spy, Options(examples=1, dtypes=("float32",)))
    assert spy.odd


def test_a_subject_elsewhere_has_no_gradients() -> None:
    subject = ContentsSubject(Declared("mine", ("decode",), Supports(), {}), "files", lambda call: {})
    assert subject.supports.backward == ()


def test_the_commands_of_the_page_do_what_it_says(client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client").symlink_to(client)
    (block,) = re.findall(r"```sh\n(mla-spec check.*?)```", page, flags=re.DOTALL)
    for line in filter(None, block.splitlines()):
        words = shlex.split(line.partition(" #")[0])
        if words[0] == "./client":
            assert subprocess.run(words, check=False).returncode == 0
        elif "ssh" not in line:
            few = [] if words[1] == "judge" else ["--law", "merge", "--examples", "2"]
            assert main([*words[1:], *few]) == 0


def test_the_record_of_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"kernel": resolve_subject("torch-absorbed"), "decode": resolve_subject("torch-absorbed").decode}
    exec(block, names)
    assert names["kernel"].recording.rate == names["decode"].recording.rate == 0.001
    assert (tmp_path / "recorded").is_dir()
