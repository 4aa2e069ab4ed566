"""export, answer and judge: the verdicts of a live subject, and what is not known is never a pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mla_spec.exchange.folder import ANSWERS, CALLS, INDEX
from mla_spec.exchange.tensor_file import encode
from mla_spec.front.cli import main
from mla_spec.installed import all_laws

COMPARED = ("verdict", "cases", "worst", "worst_case", "message", "case", "note", "dtypes", "evidence")
FAULTY = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel(TorchAbsorbed):
    name = "base-2"

    def merge(self, outs, lses):
        out, lse = super().merge(outs, lses)
        return out, lse / 0.6931471805599453
"""


def records(path: Path) -> dict[str, dict[str, Any]]:
    return {record["law"]: record for record in json.loads(path.read_text(encoding="utf-8"))}


def answered(folder: Path, subject: str, *options: str) -> None:
    """Export, and answer round after round until no call is left."""
    assert main(["export", str(folder), "--subject", subject, "--seed", "0", *options]) == 0
    known = -1
    while known != (known := len(list((folder / CALLS).iterdir()))):
        assert main(["answer", str(folder), subject]) == 0
        assert main(["export", str(folder)]) == 0


def judged(folder: Path, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    out = folder.parent / "judged.json"
    code = main(["judge", str(folder), "--json", str(out), "--in-process", *options])
    return code, records(out)


def checked(folder: Path, subject: str, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    out = folder.parent / "checked.json"
    line = ["check", subject, "--seed", "0", "--no-minimise", "--in-process", "--json", str(out)]
    code = main([*line, *options])
    return code, records(out)


LAWS = [
    "--law",
    "merge",
    "--law",
    "rope",
    "--law",
    "write_cache",
    "--law",
    "indexer",
    "--examples",
    "2",
    "--dtype",
    "bfloat16",
]


def test_files_give_the_verdicts_of_a_live_subject(tmp_path: Path) -> None:
    folder = tmp_path / "calls"
    answered(folder, "torch-absorbed", *LAWS)
    (code, by_files), (_, live) = judged(folder), checked(folder, "torch-absorbed", *LAWS)
    assert code == 0
    passed = 0
    for law, record in live.items():
        if all_laws()[law].live and record["verdict"] == "pass":
            assert by_files[law]["verdict"] == "unsupported"
            assert by_files[law]["message"] == "outputs come from files: this law needs a live subject"
        elif by_files[law]["verdict"] == "pass":
            passed += 1
            assert {name: by_files[law][name] for name in COMPARED} == {name: record[name] for name in COMPARED}
        elif record["verdict"] == "pass":
            assert "does not offer" in by_files[law]["message"] or "not differentiable" in by_files[law]["message"]
    assert passed >= 18


def test_files_give_the_failures_of_a_live_subject(tmp_path: Path) -> None:
    kernel, folder = tmp_path / "kernel.py", tmp_path / "calls"
    kernel.write_text(FAULTY, encoding="utf-8")
    options = [
        f"--law=test_merge_{law}" for law in ("agrees_with_reference", "lse_agrees_with_reference", "is_associative")
    ]
    options += ["--examples", "4"]
    answered(folder, f"{kernel}:Kernel", *options)
    (code, by_files), (_, live) = judged(folder), checked(folder, f"{kernel}:Kernel", *options)
    assert code == 1
    assert by_files["test_merge_lse_agrees_with_reference"]["verdict"] == "fail"
    for law, record in by_files.items():
        assert {name: record[name] for name in COMPARED} == {name: live[law][name] for name in COMPARED}
    failure = by_files["test_merge_lse_agrees_with_reference"]
    assert failure["replay"].startswith(
        f"mla-spec check files:{folder} --law test_merge_lse_agrees_with_reference --case"
    )
    assert main([*failure["replay"].split()[1:], "--in-process"]) == 1


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one law with all its answers."""
    folder = tmp_path_factory.mktemp("merge") / "calls"
    answered(
        folder, "torch-absorbed", "--law", "test_merge_agrees_with_reference", "--dtype", "float32", "--examples", "3"
    )
    return folder


@pytest.fixture
def copied(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "calls"))


def test_a_missing_answer_is_incomplete(copied: Path) -> None:
    for path in (copied / ANSWERS).iterdir():
        path.unlink()
    code, found = judged(copied)
    (record,) = found.values()
    assert (code, record["verdict"]) == (3, "incomplete")
    assert (
        record["message"]
        == f"no answer to calls/{record['message'].split('/')[1].split(':')[0]}: 0 of 3 calls in {copied} have one"
    )


def test_a_damaged_answer_is_one_sentence(copied: Path) -> None:
    for path in (copied / ANSWERS).iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    code, found = judged(copied)
    (record,) = found.values()
    assert (code, record["verdict"]) == (1, "crashed")
    assert "is no safetensors file" in record["message"]
    assert "\n" not in record["message"]


def test_a_refused_call_is_unsupported(copied: Path) -> None:
    for path in (copied / ANSWERS).iterdir():
        path.write_bytes(encode({}, {"unsupported": "too wide"}))
    code, found = judged(copied)
    (record,) = found.values()
    assert (code, record["verdict"]) == (3, "unsupported")
    assert record["message"] == "refused by the subject: too wide"


def test_a_law_that_waits_for_a_round_is_no_pass(tmp_path: Path) -> None:
    folder = tmp_path / "calls"
    options = [
        "--law",
        "test_merge_of_decoded_parts_is_the_whole",
        "--dtype",
        "float32",
        "--examples",
        "2",
        "--seed",
        "0",
    ]
    assert main(["export", str(folder), *options]) == 0
    assert main(["answer", str(folder), "torch-absorbed"]) == 0
    code, found = judged(folder)
    (record,) = found.values()
    assert (code, record["verdict"]) == (3, "unsupported")
    assert "depends on earlier answers" in record["message"]
    assert main(["export", str(folder)]) == 0
    assert main(["answer", str(folder), "torch-absorbed"]) == 0
    assert judged(folder)[0] == 0


def test_a_subject_that_ends_its_process_answers_so(tmp_path: Path) -> None:
    kernel, folder = tmp_path / "kernel.py", tmp_path / "calls"
    kernel.write_text("import os\nclass Ends:\n    def merge(self, *arguments, **options):\n        os._exit(0)\n")
    spec = f"{kernel}:Ends"
    options = ["--law", "test_merge_agrees_with_reference", "--dtype", "float32", "--examples", "2", "--seed", "0"]
    assert main(["export", str(folder), "--subject", spec, *options]) == 0
    assert main(["answer", str(folder), spec]) == 0
    code, found = judged(folder)
    (record,) = found.values()
    assert (code, record["verdict"]) == (1, "crashed")
    assert "the process ended with exit code 0" in record["message"]


def test_what_does_not_fit_is_said_and_no_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "calls"
    options = ["--law", "test_merge_agrees_with_reference", "--dtype", "float32", "--examples", "8", "--seed", "0"]
    assert main(["export", str(folder), *options, "--most", "0.001"]) == 0
    assert "the folder is full: test_merge_agrees_with_reference" in capsys.readouterr().out
    assert sum(path.stat().st_size for path in (folder / CALLS).iterdir()) <= 0.001 * 2**20
    assert main(["answer", str(folder), "torch-absorbed"]) == 0
    code, found = judged(folder)
    assert (code, next(iter(found.values()))["verdict"]) == (3, "unsupported")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["export", "FOLDER", "--seed", "5"], "seed cannot be another"),
        (["export", "NEW", "--operation", "layer"], "the operation 'layer' has no calls as files"),
        (["export", "NEW", "--subject", "gone.json"], "cannot read 'gone.json'"),
        (["export", "NEW", "--subject", "command:./gone"], "'./gone' cannot be started"),
        (["export", "NEW", "--dtype", "float31"], "unknown dtype 'float31'"),
        (["judge", "NEW"], "cannot read"),
        (["answer", "NEW", "torch-absorbed"], "cannot read"),
        (["check", "files:NEW"], "cannot read"),
    ],
)
def test_what_cannot_be_done_is_said(
    line: list[str], says: str, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"FOLDER": str(merged), "NEW": str(tmp_path / "new"), "files:NEW": f"files:{tmp_path / 'new'}"}
    assert main([names.get(word, word) for word in line]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_call_that_was_changed_is_not_answered(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((copied / CALLS).iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert main(["answer", str(copied), "torch-absorbed"]) == 2
    assert "it is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["\ud800", "../../secret", "", "A" * 64])
def test_a_call_has_no_other_name_than_an_address(name: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (copied / INDEX).read_text(encoding="utf-8").splitlines()
    call = next(line for line in lines if json.loads(line)["type"] == "call")
    lines[lines.index(call)] = json.dumps({**json.loads(call), "call": name})
    (copied / INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["judge", str(copied)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected a SHA-256" in error


def test_the_index_says_what_was_written(merged: Path) -> None:
    lines = [json.loads(line) for line in (merged / INDEX).read_text(encoding="utf-8").splitlines()]
    kinds = [line["type"] for line in lines]
    assert kinds[0] == "exchange"
    assert set(kinds[1:]) == {"call", "law"}
    assert {line["call"] for line in lines if line["type"] == "call"} == {
        path.stem for path in (merged / CALLS).iterdir()
    }
