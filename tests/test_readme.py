"""What the README shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.operations.all import parse_case

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def test_the_example_kernel_conforms_in_at_most_15_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("python", "class Kernel")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    (tmp_path / "my_kernel.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert main(["check", "my_kernel.py:Kernel", "--examples", "40", "--seed", "0", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "Kernel: offers decode" in out
    assert "laws do not apply: does not offer " in out


def test_the_profile_example_runs() -> None:
    exec(block("python", "Profile.default"), {})


def test_every_named_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in set(re.findall(r"`mla-spec ([a-z]+)", README)):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_every_case_and_law_named_exists() -> None:
    cases = set(re.findall(r"\b[a-z]+:dtype=\S+", README.replace("\\\n", "")))
    assert cases
    assert {parse_case(case).short_id for case in cases} == cases
    assert set(re.findall(r"\btest_\w+(?= )", README.partition("## ")[0])) <= set(all_laws())


def test_nothing_stands_between_the_title_and_the_first_example() -> None:
    first = README.splitlines().index("```sh check")
    assert first < 10
