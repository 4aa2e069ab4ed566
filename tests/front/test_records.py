"""Records that are appended as they are made: interrupted, resumed, divided, merged."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mla_spec.front.cli import main
from mla_spec.judging.environment import code_of
from mla_spec.judging.plan import Shard, parse_shard, plan
from mla_spec.judging.records import RecordFile, RecordsError, read_records

KERNEL = """
import os
import time
from mla_spec.adapters.pytorch import TorchAbsorbed

class Rope:
    name = "rope-only"
    wrong = ()
    pause = 0

    def rope(self, x, *arguments, **options):
        time.sleep(self.pause)
        out = TorchAbsorbed().rope(x, *arguments, **options)
        return 2 * out if str(x.dtype) in self.wrong else out

class Wrong(Rope):
    name = "wrong-in-two"
    wrong = ("torch.float32", "torch.float16")

class Slow(Rope):
    name = "slow"
    pause = float(os.environ.get("PAUSE", "0"))
"""
LAWS = ("test_rope_agrees_with_reference", "test_rope_preserves_norm")
ASKED = (*(word for law in LAWS for word in ("--law", law)), "--examples", "8")
CELLS = 8
"""Two laws in four dtypes."""


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    return str(path)


def lines(path: Path, kind: str = "verdict") -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["type"] == kind]


def cells(path: Path) -> Counter[tuple[str, str]]:
    return Counter((line["law"], line["dtype"]) for line in lines(path))


def check(spec: str, *arguments: object) -> int:
    return main(["check", spec, *ASKED, "--in-process", "--explain", "0", *map(str, arguments)])


def test_a_run_is_recorded_with_all_that_its_verdicts_depend_on(kernel: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    assert check(f"{kernel}:Rope", "--records", file, "--seed", 0) == 0
    (run,), (subject,), (end,) = lines(file, "run"), lines(file, "subject"), lines(file, "end")
    assert (run["schema"], run["version"], run["seed"], run["examples"]) == ("mla-spec-records", 1, 0, 8)
    assert run["laws"] == list(LAWS)
    assert {"suite", "python", "numpy", "torch", "platform", "device", "gpu"} <= set(run)
    assert subject["operations"] == ["rope"]
    assert subject["supports"]["dtypes"] == ["float64", "float32", "float16", "bfloat16"]
    assert subject["profiles"]["float16"]["probabilities"] == "float16"
    assert len(subject["source"]) == 64
    assert (end["reason"], end["exit"]) == ("complete", 0)
    assert len(cells(file)) == CELLS
    assert set(cells(file).values()) == {1}


def test_the_state_of_the_repository_is_recorded(kernel: str, tmp_path: Path) -> None:
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "kernel.py"), ("commit", "-qm", "one")):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    clean = code_of(f"{kernel}:Rope")
    assert (clean["revision"], clean["modified"]) == (head, False)
    Path(kernel).write_text(KERNEL + "\n")
    changed = code_of(f"{kernel}:Rope")
    assert (changed["revision"], changed["modified"]) == (head, True)
    assert changed["source"] != clean["source"]


def test_a_failing_dtype_does_not_hide_the_next(
    kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = tmp_path / "records.jsonl", tmp_path / "records.json"
    assert check(f"{kernel}:Wrong", "-v", "--records", file, "--json", target, "--seed", 0) == 1
    verdicts = {(line["law"], line["dtype"]): line["verdict"] for line in lines(file)}
    assert [d for (law, d), v in verdicts.items() if law == LAWS[0] and v == "fail"] == ["float32", "float16"]
    assert verdicts[LAWS[0], "bfloat16"] == "pass"
    out = capsys.readouterr().out
    assert "float32 is shown; float64: pass, float16: fail, bfloat16: pass" in out
    first, _ = json.loads(target.read_text())
    assert first["dtypes"] == {"float64": "pass", "float32": "fail", "float16": "fail", "bfloat16": "pass"}


def test_resuming_repeats_nothing_and_gives_the_same_report(kernel: str, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    assert check(f"{kernel}:Wrong", "--records", whole, "--json", first, "--seed", 0) == 1
    kept = [line for line in whole.read_text().splitlines(keepends=True) if '"type": "end"' not in line][:5]
    part.write_text("".join(kept) + '{"type": "verdict", "run')
    assert check(f"{kernel}:Wrong", "--resume", part, "--json", second) == 1
    assert set(cells(part).values()) == {1}
    assert cells(part) == cells(whole)
    assert "".join(kept) == part.read_text()[: len("".join(kept))]

    def without_times(path: Path) -> list[Any]:
        return [{k: v for k, v in record.items() if k != "seconds"} for record in json.loads(path.read_text())]

    assert without_times(first) == without_times(second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "1"), "is of another run: seed is 1 in one and 0 in the other"),
        (("--examples", "9"), "is of another run: examples is 9 in one and 8 in the other"),
        (("--dtype", "float32"), "dtypes of {spec} is ('float32',) in one and ('float64', "),
        (("--records", "other.jsonl"), "--resume FILE goes on in FILE: --records cannot be another one"),
    ],
)
def test_only_the_same_run_is_resumed(
    options: tuple[str, ...], message: str, kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.jsonl"
    check(f"{kernel}:Rope", "--records", file, "--seed", 0)
    before = file.read_bytes()
    assert check(f"{kernel}:Rope", "--resume", file, *options) == 2
    assert message.format(spec=f"{kernel}:Rope") in capsys.readouterr().err
    assert file.read_bytes() == before


def test_code_that_changed_is_not_resumed(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "records.jsonl"
    check(f"{kernel}:Rope", "--records", file, "--seed", 0)
    Path(kernel).write_text(KERNEL + "\n")
    assert check(f"{kernel}:Rope", "--resume", file) == 2
    assert "is of another run: source of " in capsys.readouterr().err


def start(spec: str, *arguments: object) -> subprocess.Popen[str]:
    """A run so slow that it can be interrupted."""
    command = [sys.executable, "-m", "mla_spec.front.cli", "check", spec, *ASKED, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PAUSE": "0.02"},
    )


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_lines(path: Path, count: int, writer: subprocess.Popen[str]) -> bool:
    """Whether a file has this many lines, or gets no more."""
    return writer.poll() is not None or (path.exists() and path.read_text().count("\n") >= count)


def no_process_of(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("way", ["--in-process", "--jobs=1"])
def test_an_interrupted_run_prints_what_exists_and_can_go_on(
    number: signal.Signals, way: str, kernel: str, tmp_path: Path
) -> None:
    file = tmp_path / "records.jsonl"
    process = start(f"{kernel}:Slow", "--records", file, way, "--seed", 0)
    wait_until(lambda: file.exists() and len(lines(file)) >= 2)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "so far, of a part of the run: " in out
    assert f"{number.name}: " in err
    assert f"of {CELLS} cells are judged" in err
    assert "Traceback" not in err
    (end,) = lines(file, "end")
    assert (end["reason"], end["exit"]) == (number.name, 130)
    assert {line["verdict"] for line in lines(file)} == {"pass"}
    assert check(f"{kernel}:Slow", "--resume", file) == 0
    assert set(cells(file).values()) == {1}
    assert len(cells(file)) == CELLS


def test_no_verdict_that_was_written_is_lost_by_a_kill(kernel: str, tmp_path: Path) -> None:
    file, drawn = tmp_path / "records.jsonl", random.Random(0)
    written: list[str] = []
    for _ in range(int(os.environ.get("MLA_SPEC_KILLS", "2"))):
        process = start(f"{kernel}:Slow", "--resume", file, "--jobs", 1, *(() if written else ("--seed", 0)))
        count = len(written)
        reached = drawn.randint(count, count + 4)
        wait_until(partial(has_lines, file, reached, process))
        time.sleep(drawn.uniform(0, 1))
        process.kill()
        process.wait()
        wait_until(partial(no_process_of, process.pid))
        process.communicate()
        text = file.read_text() if file.exists() else ""
        assert text.splitlines()[:count] == written
        written = text[: text.rfind("\n") + 1].splitlines()
    assert check(f"{kernel}:Slow", "--resume", file) == 0
    assert file.read_text().splitlines()[: len(written)] == written
    assert set(cells(file).values()) == {1}
    assert len(cells(file)) == CELLS


def test_a_time_limit_ends_the_run_as_incomplete(
    kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAUSE", "0.02")
    file = tmp_path / "records.jsonl"
    options = ("--time-limit", "0.3", "--examples", "400", "--seed", 0)
    assert check(f"{kernel}:Slow", "--records", file, *options) == 3
    assert "time limit: " in capsys.readouterr().err
    assert lines(file, "end")[0]["reason"] == "time limit"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_full_disk_ends_the_run_as_incomplete(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(f"{kernel}:Rope", "--records", "/dev/full", "--seed", 0) == 3
    assert "cannot write '/dev/full': No space left on device" in capsys.readouterr().err


def test_a_full_disk_after_the_run_is_said_and_the_report_is_printed(
    kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(f"{kernel}:Rope", "--json", "/dev/full", "--seed", 0) == 3
    captured = capsys.readouterr()
    assert "conforms: 2 pass" in captured.out
    assert "cannot write '/dev/full': No space left on device" in captured.err


def test_one_run_at_a_time_writes_to_a_file(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "records.jsonl"
    with RecordFile(str(file)):
        assert check(f"{kernel}:Rope", "--records", file) == 2
        assert "another run is writing to it" in capsys.readouterr().err
        assert check(f"{kernel}:Rope", "--records", tmp_path / "other.jsonl", "--seed", 0) == 0
    assert not file.exists()  # no run began in it


def test_nothing_is_appended_to_what_holds_no_records(tmp_path: Path) -> None:
    file = tmp_path / "thesis.txt"
    file.write_text("chapter one")
    with pytest.raises(RecordsError, match="ends with what is no record; nothing is appended to it"):
        RecordFile(str(file))
    assert file.read_text() == "chapter one"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_shards_divide_the_cells(count: int) -> None:
    cells = plan([(("a",), ("float64", "float32")), (("b",), ())], LAWS, 7)
    parts = [Shard(i, count).take(cells) for i in range(1, count + 1)]
    assert sorted(cell for part in parts for cell in part) == sorted(cells)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "1", "a/b", "1/2/3", "-1/2", "1/9999999", "१/२", "1 /2", ""])
def test_a_shard_that_is_none_is_refused(text: str, kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a shard is i/n with 1 <= i <= n"):
        parse_shard(text)
    assert check(f"{kernel}:Rope", f"--shard={text}") == 2


def shards(kernel: str, folder: Path, count: int, *, subject: str = "Wrong") -> list[str]:
    files = [str(folder / f"{i}-{count}.jsonl") for i in range(1, count + 1)]
    for i, file in enumerate(files, 1):
        check(f"{kernel}:{subject}", "--shard", f"{i}/{count}", "--records", file, "--seed", 0)
    return files


def test_merged_shards_are_the_whole_run(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for count in (1, 3):
        target = tmp_path / f"{count}.json"
        assert main(["merge", *shards(kernel, tmp_path, count), "--json", str(target)]) == 1
        found.append([{k: v for k, v in r.items() if k != "seconds"} for r in json.loads(target.read_text())])
    assert found[0] == found[1]
    assert f"{CELLS} cells of 3 runs" in capsys.readouterr().out


def test_merging_says_what_is_missing(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = shards(kernel, tmp_path, 2, subject="Rope")
    assert main(["merge", *files]) == 0
    assert main(["merge", files[0]]) == 3
    assert "4 cells of 2 laws have no record, such as test_rope_" in capsys.readouterr().out


def test_merging_says_what_is_repeated_and_what_disagrees(
    kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = shards(kernel, tmp_path, 1, subject="Rope")
    again = tmp_path / "again.jsonl"
    again.write_text(Path(file).read_text())
    assert main(["merge", file, str(again)]) == 0
    assert f"{CELLS} records repeat a cell, such as test_rope_" in capsys.readouterr().out
    again.write_text(Path(file).read_text().replace('"verdict": "pass"', '"verdict": "incomplete"', 1))
    assert main(["merge", file, str(again)]) == 3
    assert "float64: pass in one run and incomplete in another" in capsys.readouterr().out


def test_runs_of_other_options_are_not_merged(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{seed}.jsonl") for seed in (0, 1)]
    for seed, file in enumerate(files):
        check(f"{kernel}:Rope", "--seed", seed, "--records", file)
    assert main(["merge", *files]) == 2
    assert "is of another run: seed is 0 in one and 1 in the other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no run"),
        ("[]\n", "type is None; expected one of run, subject, verdict, cause, end"),
        ("\x00\n", "not a JSON object in UTF-8; expected one of type run, "),
        ("[" * 100_000 + "\n", "not a JSON object in UTF-8; expected one of type run, "),
        ('{"type": "end", "run": "a", "reason": "", "exit": 0}\n', "the run 'a' has no line that begins it"),
        ('{"type": "end", "run": "a", "reason": "", "exit": -1}\n', "exit is -1; expected an integer of at least 0"),
        ('{"type": "end", "run": "a", "reason": ""}\n', "missing 1 required keyword-only argument: 'exit'"),
        ('{"type": "end", "more": 1}\n', "has the unknown field 'more'"),
        ('{"type": "run", "schema": "mla-spec-records", "version": 2}\n', "version 2; this version reads"),
    ],
)
def test_a_file_that_holds_no_records_is_refused_in_one_sentence(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(content)
    assert main(["merge", str(file)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_unfinished_last_line_counts_nothing(kernel: str, tmp_path: Path) -> None:
    (file,) = shards(kernel, tmp_path, 1, subject="Rope")
    data = Path(file).read_bytes()
    for length in range(len(data) - 40, len(data), 7):
        Path(file).write_bytes(data[:length])
        assert len(read_records(file)[0].verdicts) == CELLS
