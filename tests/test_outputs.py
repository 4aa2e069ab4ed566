"""What a user names as output is written to, and not replaced where it is no regular file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mla_spec.front.cli import main
from mla_spec.text.files import require_writable, write_atomically

ASKED = ("--law", "test_absorb_splits_kv_b_proj", "--examples", "1", "--seed", "0", "--in-process", "-v")
CHECK = ("check", "torch-absorbed", *ASKED)


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    for there in (False, True):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        require_writable(link)
        write_atomically(link, "new")
        assert (link.is_symlink(), target.is_symlink(), target.read_text()) == (True, False, "new"), there


def test_all_names_of_a_file_see_the_new_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("something that is longer")
    os.link(first, second)
    write_atomically(first, "new")
    assert (second.read_text(), first.stat().st_ino) == ("new", second.stat().st_ino)


def test_permissions_of_a_replaced_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o640)
    write_atomically(path, "new")
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o640, "new")


def test_a_device_stays_one() -> None:
    before = os.stat("/dev/null")
    require_writable("/dev/null")
    write_atomically("/dev/null", "text")
    after = os.stat("/dev/null")
    assert (after.st_ino, after.st_rdev, after.st_mode) == (before.st_ino, before.st_rdev, before.st_mode)


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device or address"):
        write_atomically(pipe, "text")  # nobody reads it: that would wait for ever
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    time.sleep(0.2)
    require_writable(pipe)
    write_atomically(pipe, "text")
    reader.join(20)
    assert got == ["text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("option", ["--json", "--records", "--resume"])
@pytest.mark.parametrize("path", ["no/such/folder/x.json", "{folder}", "a\0b", "x" * 300])
def test_what_cannot_be_written_is_said_before_the_run(
    option: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*CHECK, option, path.format(folder=tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mla-spec: ")
    assert captured.err.count("\n") == 1


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", "mla_spec.front.cli", *CHECK]
    line = command.replace("CHECK", " ".join(words))
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, check=False, env={**os.environ, **environment}
    )


def test_the_standard_output_takes_the_records_alone(tmp_path: Path) -> None:
    done = run("CHECK --json -", tmp_path)
    (record,) = json.loads(done.stdout)
    assert record["verdict"] == "pass"
    assert b"1 pass in" in done.stderr


def test_a_redirected_output_keeps_report_and_records(tmp_path: Path) -> None:
    done = run("CHECK --json /dev/stdout --records /dev/stdout > both.txt", tmp_path)
    text = (tmp_path / "both.txt").read_text()
    assert (done.returncode, "1 pass in" in text, '"verdict": "pass"' in text) == (0, True, True)
    assert '{"type": "run"' in text
    assert [path.name for path in tmp_path.iterdir()] == ["both.txt"]


def test_a_report_that_finds_no_space_is_no_traceback(tmp_path: Path) -> None:
    done = run("CHECK > /dev/full", tmp_path)
    assert done.returncode == 3
    assert done.stderr == b"mla-spec: the report cannot be written: no space is left\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_every_encoding_of_a_terminal_will_do(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(
        "class K:\n    name = 'n\\u1d43me \\x1b[31m \\ud800'\n"
        "    def absorb(self, *a, **k):\n        raise ValueError('\\u221e \\x00' + 'x' * 10**6)\n",
        encoding="utf-8",
    )
    line = "CHECK".replace("CHECK", " ".join([sys.executable, "-m", "mla_spec.front.cli", *CHECK]))
    line = line.replace("torch-absorbed", "kernel.py:K --no-minimise")
    done = run(line, tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    text = done.stdout.decode(encoding)
    assert "crashed" in text
    assert "\x1b" not in text
    assert len(text) < 10_000
    assert done.stderr == b""
