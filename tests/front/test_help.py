"""The help of every command, the command as a module, and the completion of a shell."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mla_spec
from mla_spec.front import cli
from mla_spec.front.help import EXAMPLES, EXIT_CODES


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = [action.choices for action in cli._parser()._actions if isinstance(action.choices, dict)]
    return choices


def test_every_command_has_examples_and_exit_codes() -> None:
    assert set(EXAMPLES) == set(EXIT_CODES) == set(commands())


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_them(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert f"exit codes: {EXIT_CODES[command]}" in out
    assert all(f"\n  {line}\n" in out for line in EXAMPLES[command])


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_commands(line: str) -> None:
    name, *arguments = line.split()
    assert name == "mla-spec"
    cli._parser().parse_args(arguments)


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "mla_spec", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"mla-spec {mla_spec.__version__}\n"


def test_dir_lists_what_is_exported() -> None:
    assert dir(mla_spec) == sorted(mla_spec.__all__)


@pytest.mark.skipif(importlib.util.find_spec("argcomplete") is None, reason="argcomplete is not installed")
def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    assert completed("mla-spec se", tmp_path) == ["selftest", "sensitivity"]
    assert completed("mla-spec check --se", tmp_path) == ["--seed"]


def completed(line: str, folder: Path) -> list[str]:
    """What bash would offer at the end of ``line``."""
    answer = folder / "answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = "from mla_spec.front.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    return sorted(answer.read_text().replace(" ", "").split("\n"))
