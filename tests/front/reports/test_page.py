"""Every command that ``docs/reports.md`` shows does what the page says."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from mla_spec.front.cli import main

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "reports.md").read_text(encoding="utf-8")
README = (Path(__file__).resolve().parents[3] / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line]


def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (kernel,) = re.findall(r"```python\n(# my_kernel.py.*?)```", README, flags=re.DOTALL)
    wrong = kernel.replace("class Kernel:", "class Wrong:").replace("* softmax_scale", "* q.shape[-1] ** -0.5")
    assert wrong.count("q.shape[-1] ** -0.5") == 1
    Path("my_kernel.py").write_text(kernel + wrong)
    seen = commands()
    assert len(seen) >= 5
    for line in seen:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "mla-spec"
        expected = int(found[1]) if (found := re.search(r"# exit code (\d)", line)) else 0
        here = ["--in-process"] if arguments[0] == "check" else []
        assert main([*arguments, *here]) == expected, line
        for option, name in pairwise(arguments):
            if option in ("-o", "--records", "--export", "--badge"):
                assert Path(name).stat().st_size > 0, line
    assert "::notice title=mla-spec%3A Kernel::conforms" in capsys.readouterr().out
