"""Files that were damaged anywhere: a right answer, or one sentence. ``MLA_SPEC_FUZZ`` says how many of each kind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.exchange.call import Call, address
from mla_spec.exchange.contents import answer_by
from mla_spec.exchange.declared import Declared
from mla_spec.exchange.folder import CALLS, INDEX, Folder, read_calls
from mla_spec.exchange.source import recorded_calls
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.front.cli import main
from mla_spec.judging.recorded import judge_answer
from mla_spec.subjects.supports import Supports
from tests.exchange.test_replay import flashinfer, named
from tests.exchange.test_rows import whole
from tests.test_fuzz import SLOWEST, mutated, raw, spoiled

COUNT = int(os.environ.get("MLA_SPEC_FUZZ", "10"))
SEED = int(os.environ.get("MLA_SPEC_FUZZ_SEED", "20260102"))
WRITTEN = ("test_merge_agrees_with_reference", "test_write_cache_stores_latent_then_rope")
HUGE = (
    "-1",
    "0",
    "2147483648",
    "9223372036854775808",
    "1" + "0" * 400,
    "1e308",
    "NaN",
    '"x"',
    "null",
    "[]",
    "{}",
    "true",
)


def record_some(folder: Path, *, tensors: bool) -> None:
    kernel = mla_spec.record(TorchAbsorbed(), str(folder), rate=1, tensors=tensors)
    for name in ("decode", "ragged_decode", "sparse_decode", *(["decode_quantized"] if tensors else [])):
        operation, call = whole(name)
        places, options = call.arguments()
        getattr(kernel, operation.name)(*places, **options)
    kernel.merge(torch.ones(2, 1, 3, 1, 2), torch.zeros(2, 1, 1, 3))


def export_some(folder: Path) -> None:
    laws = [word for law in WRITTEN for word in ("--law", law)]
    assert main(["export", str(folder), *laws, "--examples", "1", "--dtype", "float32", "--seed", "0"]) == 0
    exported = Folder.opened(str(folder))
    for name, call in read_calls(exported):
        exported.put_answer(name, answer_by(TorchAbsorbed(), call))


def make_corpus(folder: Path) -> None:
    calls = folder.with_name("calls-of-the-corpus")
    kernel = mla_spec.record(TorchAbsorbed(), str(calls), rate=1)
    kernel.merge(torch.ones(2, 1, 3, 1, 2), torch.zeros(2, 1, 1, 3))
    assert main(["golden", "regenerate", "--dir", str(folder), "--calls", str(calls)]) == 0


def make_records(folder: Path) -> None:
    folder.mkdir()
    laws = [f"--law=test_merge_{name}" for name in ("agrees_with_reference", "is_associative")]
    line = ["check", "torch-absorbed", *laws, "--examples", "1", "--in-process", "--seed", "0"]
    assert main([*line, "--records", str(folder / "a.jsonl")]) == 0
    shutil.copy(folder / "a.jsonl", folder / "b.jsonl")


MAKE: dict[str, Callable[[Path], None]] = {
    "recorded": lambda folder: record_some(folder, tensors=True),
    "structure": lambda folder: record_some(folder, tensors=False),
    "exchange": export_some,
    "corpus": make_corpus,
    "records": make_records,
    "flashinfer": lambda folder: flashinfer(folder, ".safetensors"),
    "named": lambda folder: shutil.move(named(folder), folder / "names.toml") and None,
}

LINES: dict[str, list[list[str]]] = {
    "recorded": [["judge", "{}"], ["golden", "regenerate", "--dir", "{}-new", "--calls", "{}"]],
    "structure": [["judge", "{}"], ["golden", "regenerate", "--dir", "{}-new", "--calls", "{}"]],
    "exchange": [["judge", "{}", "--in-process"], ["export", "{}"]],
    "corpus": [["golden", "verify", "--dir", "{}"], ["golden", "regenerate", "--dir", "{}"]],
    "records": [
        ["merge", "{}/a.jsonl", "{}/b.jsonl"],
        ["report", "{}/a.jsonl", "--format", "html", "-o", "{}-new"],
        ["diff", "{}/a.jsonl", "{}/b.jsonl"],
        ["statement", "{}/a.jsonl"],
    ],
    "flashinfer": [["golden", "regenerate", "--dir", "{}-new", "--calls", "{}"], ["judge-dump", "{}"]],
    "named": [["judge-dump", "{}", "{}/names.toml"]],
}


def judge_dump(path: str, names: str | None = None) -> int:
    """What ``replay`` does with recorded outputs, without a process for a subject."""
    try:
        for each in recorded_calls(path, names):
            if isinstance(each.call, Call) and each.answer is not None:
                judge_answer(Declared("x", (each.call.operation,), Supports(), {}), each.call, each.answer)
    except ExchangeError:
        return 2
    return 0


def spoil_header(data: bytes, drawn: random.Random) -> bytes:
    """A safetensors file with another header, of the length that it says or not."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return data[::-1]
    if drawn.random() < 0.5:
        text = json.dumps(spoiled(header, drawn)).encode("utf-8", "surrogatepass")
    else:
        text = mutated(json.dumps(header), drawn).encode("utf-8", "surrogatepass")
    said = len(text) if drawn.random() < 0.9 else drawn.choice((0, 2**31, 2**63, 2**64 - 1, len(text) + 1))
    return said.to_bytes(8, "little") + text + data[8 + size :]


def spoil_text(data: bytes, drawn: random.Random) -> bytes:
    """A text of which a line, a number or a part of JSON is another."""
    text = data.decode("utf-8", "replace")
    lines = text.splitlines()
    kind = drawn.randrange(4)
    if kind == 0 or not lines:
        return raw(mutated(text, drawn), drawn)
    at = drawn.randrange(len(lines))
    if kind == 1:
        lines[at : at + 1] = drawn.choice(([], [lines[at]] * 2, [lines[at][: len(lines[at]) // 2]]))
    elif kind == 2:
        with contextlib.suppress(ValueError, TypeError):  # of a number alone
            lines[at] = json.dumps(spoiled(json.loads(lines[at]), drawn))
    else:
        digits = [i for i, letter in enumerate(lines[at]) if letter.isdigit()]
        if digits:
            i = drawn.choice(digits)
            lines[at] = lines[at][:i] + drawn.choice(HUGE) + lines[at][i + 1 :]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def damaged(data: bytes, drawn: random.Random, suffix: str) -> bytes:
    kind = drawn.randrange(5)
    if kind == 0 and data:
        flipped = bytearray(data)
        for _ in range(drawn.choice((1, 1, 8))):
            flipped[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return data[: drawn.randrange(len(data) + 1)]
    if suffix == ".safetensors":
        return spoil_header(data, drawn)
    return spoil_text(data, drawn) if suffix != ".npy" else data + bytes(drawn.randrange(1, 9))


def damage(folder: Path, drawn: random.Random) -> None:
    """Damage one file, take it away, or put another in its place; a call's name and line may follow its content."""
    path = drawn.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind, data = drawn.randrange(12), path.read_bytes()
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.mkdir()
    elif kind == 2:
        other = drawn.choice(sorted(each for each in folder.rglob("*") if each.is_file()))
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(damaged(data, drawn, path.suffix))
    index = folder / INDEX
    if kind > 3 and path.parent.name == CALLS and path.suffix == ".safetensors" and index.is_file():
        name = address(path.read_bytes())
        index.write_text(index.read_text(encoding="utf-8").replace(path.stem, name), encoding="utf-8")
        answer = folder / "answers" / path.name
        if answer.exists():
            answer.rename(answer.with_name(f"{name}.safetensors"))
        path.rename(path.with_name(f"{name}.safetensors"))


def asks_for_more(folder: Path, line: list[str]) -> bool:
    """Whether more laws or examples are asked for than there were, all of them where no index says which; it takes long."""
    if line[0] == "export" and not (folder / INDEX).exists():
        return True
    try:
        head = json.loads((folder / INDEX).read_text(encoding="utf-8").splitlines()[0])
        more = int(head["examples"]) > 1 or not set(head["laws"]) <= set(WRITTEN) or head["dtypes"] != ["float32"]
        return more and not head["recorded"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return False


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undamaged")
    for kind, make in MAKE.items():
        make(folder / kind)
    return folder


@pytest.mark.parametrize("kind", MAKE)
def test_damage_is_a_right_answer_or_one_sentence(
    kind: str, undamaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = random.Random(f"{SEED} {kind}")
    codes = []
    count = max(2, COUNT // 4) if kind == "corpus" else COUNT  # a whole corpus is a second each
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(undamaged / kind, folder)
        damage(folder, drawn)
        line = [word.replace("{}", str(folder)) for word in drawn.choice(LINES[kind])]
        if asks_for_more(folder, line):
            continue
        start = time.monotonic()
        capsys.readouterr()
        try:
            code = judge_dump(*line[1:]) if line[0] == "judge-dump" else main(line)
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {' '.join(line)}: {error!r}") from error
        said = capsys.readouterr()
        assert code in (0, 1, 2, 3), (number, line)
        assert time.monotonic() - start < SLOWEST, (number, line)
        assert "Traceback" not in said.out + said.err, (number, line)
        if code == 2 and line[0] != "judge-dump":
            assert said.err.startswith("mla-spec: "), (number, line, said.err)
            assert said.err.count("\n") == 1, (number, line, said.err)
        new = Path(f"{folder}-new")
        if code == 2 or (code == 1 and line[0] == "golden"):
            assert not new.exists() or not list(new.iterdir()), (number, line)
        codes.append(code)
        shutil.rmtree(folder)
        shutil.rmtree(new, ignore_errors=True)
    assert len(set(codes)) > 1 or count < 10
    assert len(codes) > count // 2
