"""What comes from outside, mutated: an answer or one sentence, in time. ``MLA_SPEC_FUZZ`` says how many inputs of each kind."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.front.cli import main
from mla_spec.golden.corpus import corpus
from mla_spec.golden.corpus.compare import compare
from mla_spec.golden.corpus.corpus import CorpusError
from mla_spec.judging.hardest import CorpusError as HardCasesError
from mla_spec.judging.hardest import read_hard_cases
from mla_spec.judging.records import RecordsError, read_records
from mla_spec.judging.waivers import WaiverError, read_waivers
from mla_spec.operations.all import KINDS, parse_case
from mla_spec.operations.case_limits import elements, fault
from mla_spec.operations.workload import WorkloadError, read_workload
from mla_spec.proof.selftest import matrix_from

COUNT = int(os.environ.get("MLA_SPEC_FUZZ", "200"))
SLOWEST = 60
"""Seconds that one input may take, on a machine that does other things too."""

JUNK: list[Any] = [
    None, True, -1, 0, 3, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "x" * 3000, "\x00",
    "\x1b[2J", "∞", "\ud800", "../../etc/passwd", [], [[]], {}, {"a": 1}, [None], [10**9] * 3, "2026-01-01", "*", "[",
]  # fmt: skip
WORDS = [
    "nan", "inf", "-1", "0", "1e9", "9" * 5000, "", " ", "+", "++", ",", ",,", "=", ":", "none", "true", "\x00", "∞", "٣",
    "0x10", "1_0", "half", "typical", "--", "[", "{", '"', "\\", "\n", "\r", "\t", "'", "x" * 3000,
]  # fmt: skip


def mutated(text: str, drawn: random.Random) -> str:
    """A text of which a few places are cut, repeated, or replaced by something odd."""
    for _ in range(drawn.choice((1, 1, 2, 5))):
        start = drawn.randrange(len(text) + 1)
        end = min(len(text), start + drawn.choice((0, 1, 2, 8, 40)))
        odd = drawn.choice((drawn.choice(WORDS), text[start:end] * 2, "", chr(drawn.randrange(32, 0x2FF))))
        text = text[:start] + odd + text[end:]
    return text


def spoiled(value: Any, drawn: random.Random) -> Any:
    """JSON data of which one part is junk, missing, or has another name."""
    value = copy.deepcopy(value)
    at, steps = value, drawn.randrange(1, 7)
    for step in range(steps):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = drawn.choice(keys)
        if step < steps - 1 and isinstance(at[key], dict | list):
            at = at[key]
            continue
        kind = drawn.randrange(4)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, dict):
            at[drawn.choice(("", "x", key + "s"))] = at.pop(key)
        else:
            at[key] = copy.deepcopy(drawn.choice(JUNK))
        break
    return value


def raw(text: str, drawn: random.Random) -> bytes:
    """The bytes of a text, or nearly."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(drawn.choice((0, 0, 1, 3)) if data else 0):
        data[drawn.randrange(len(data))] = drawn.randrange(256)
    return bytes(data)


class Watch:
    """Measures each input, and holds refusals to one sentence."""

    def __init__(self) -> None:
        self.accepted = self.refused = 0

    def __call__(self, ask: Callable[[], Any], refusals: tuple[type[Exception], ...]) -> Any:
        start, answer, sentence = time.monotonic(), None, None
        try:
            answer = ask()
            self.accepted += 1
        except refusals as error:
            self.refused += 1
            sentence = str(error)
        assert sentence is None or sentence.strip()
        assert time.monotonic() - start < SLOWEST
        return answer


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def drawn() -> random.Random:
    return random.Random(20260101)


SUBJECT = "class K:\n    name = 'k'\n    def absorb(self, *a, **k):\n        return None\n"
CHECK = ["check", "{folder}/k.py:K", "--in-process", "--law", "test_absorb_splits_kv_b_proj"]
"""These words stay: no subject and no law is left out, which takes long, nor is a process started for each line that is good."""
LINES: list[list[str]] = [
    [*CHECK, "--examples", "1", "--dtype", "float32"],
    [*CHECK, "--case", "decode:dtype=float32,num_heads=2"],
    [*CHECK, "--examples=1", "--shard", "1/2", "--records", "{folder}/r.jsonl"],
    [*CHECK, "--examples=1", "--resume", "{folder}/r.jsonl", "--timeout", "3"],
    [*CHECK, "--examples=1", "--waivers", "{folder}/w.toml", "--seed", "3"],
    [*CHECK, "--workload", "{folder}/s.jsonl", "--budget", "1"],
    [*CHECK, "--examples=1", "--json", "{folder}/j.json", "--device", "cpu"],
    ["merge", "{folder}/r.jsonl", "--json", "{folder}/j.json"],
    ["cache", "DeepSeek-V3", "--tokens", "100", "--batch", "2", "--page-size", "64", "--tp", "8", "--dtype", "float16"],
    ["cache", "DeepSeek-V3", "--training", "--tokens", "100"],
    ["contract", "decode"],
    ["golden", "verify", "--dir", "{folder}/none"],
]
OPTIONS = [
    "--law",
    "--case",
    "--dtype",
    "--device",
    "--threads",
    "--seed",
    "--timeout",
    "--shard",
    "--time-limit",
    "--under",
    "--help",
]


def a_line(drawn: random.Random, folder: Path) -> list[str]:
    """A command line of which words are mutated, missing or added."""
    line = [word.replace("{folder}", str(folder)) for word in drawn.choice(LINES)]
    kept = len(CHECK) if line[0] == "check" else 1
    for _ in range(drawn.choice((1, 1, 2, 3))):
        at = drawn.randrange(kept, len(line) + 1) if len(line) >= kept else len(line)
        kind = drawn.randrange(4)
        if kind == 0 and at < len(line):
            line[at] = mutated(line[at], drawn)
        elif kind == 1 and at < len(line):
            del line[at]
        elif kind == 2:
            line[at:at] = [drawn.choice(OPTIONS), drawn.choice(WORDS)]
        else:
            line.insert(at, drawn.choice(WORDS))
    return line


def test_command_lines(
    drawn: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k.py").write_text(SUBJECT)
    for _ in range(COUNT):
        line = a_line(drawn, tmp_path)
        start = time.monotonic()
        try:
            code = main(line)
        except SystemExit as error:
            code = int(str(error.code or 0))
            assert (
                "--help" in line or "-h" in line or any("--help".startswith(word) for word in line if word[:3] == "--h")
            )
        captured = capfd.readouterr()
        assert time.monotonic() - start < SLOWEST, line
        assert code in (0, 1, 2, 3), line
        assert "Traceback" not in captured.err + captured.out, line
        if code == 2:
            assert captured.err.startswith("mla-spec: "), line
            assert captured.err.count("\n") == 1, (line, captured.err)
            assert len(captured.err) < 2500, line


def test_case_ids(drawn: random.Random, watch: Watch) -> None:
    valid = [made(dtype="bfloat16").id for made in KINDS.values()]
    for _ in range(4 * COUNT):
        text = mutated(drawn.choice(valid), drawn)
        case = watch(lambda text=text: parse_case(text), (ValueError,))
        if case is None:
            continue
        assert fault(case) == ""
        assert parse_case(case.id) == case
        assert {part.partition("=")[0] for part in text.partition(":")[2].split(",")} <= {f.name for f in fields(case)}
        if max(elements(case).values()) < 10**6 and hasattr(case, "build"):
            watch(case.build, (ValueError, ArithmeticError, IndexError))
    assert min(watch.accepted, watch.refused) > COUNT / 10


WAIVERS = '[[waiver]]\nlaw = "test_decode_*"\ndtype = "float16"\nreason = "why"\nexpires = 2999-01-01\n'
WORKLOAD = '{"operation": "decode", "seqlens": [8, 30], "s": 1, "num_heads": 2, "page_size": 64}\n'
HARD = '{"law": "test_rope_preserves_norm", "case": "rope:dtype=float32,seed=3", "worst": 0.5, "subject": "a"}\n'


def records(tmp_path: Path) -> str:
    (tmp_path / "k.py").write_text(SUBJECT)
    file = tmp_path / "records.jsonl"
    line = [word.replace("{folder}", str(tmp_path)) for word in CHECK]
    main([*line, "--examples", "1", "--seed", "0", "--records", str(file)])
    return file.read_text()


@pytest.mark.parametrize(
    ("text", "read", "refusal"),
    [
        (WAIVERS, read_waivers, WaiverError),
        (WORKLOAD, read_workload, WorkloadError),
        (HARD, read_hard_cases, HardCasesError),
        ("", read_records, RecordsError),
    ],
    ids=["waivers", "workload", "hard cases", "records"],
)
def test_files(
    text: str, read: Callable[[str], Any], refusal: type[Exception], drawn: random.Random, watch: Watch, tmp_path: Path
) -> None:
    text, file = text or records(tmp_path), tmp_path / "file"
    for _ in range(COUNT):
        odd = text
        if text.startswith("{") and drawn.random() < 0.5:
            lines = text.splitlines()
            at = drawn.randrange(len(lines))
            lines[at] = json.dumps(spoiled(json.loads(lines[at]), drawn))
            odd = "\n".join(lines) + "\n"
        else:
            odd = mutated(text, drawn)
        file.write_bytes(raw(odd, drawn))
        watch(lambda: read(str(file)), (refusal,))
    assert watch.refused > COUNT / 10


def test_waivers_that_are_accepted_say_all_that_they_must(drawn: random.Random, tmp_path: Path) -> None:
    file = tmp_path / "waivers.toml"
    for _ in range(COUNT):
        file.write_bytes(raw(mutated(WAIVERS, drawn), drawn))
        try:
            found = read_waivers(str(file)).every
        except WaiverError:
            continue
        assert all(each.reason.strip() and each.expires >= date.today() for each in found)


def test_matrices(drawn: random.Random, watch: Watch) -> None:
    record = {"law": "test_rope_preserves_norm", "subject": "a", "verdict": "fail", "case": "rope:dtype=float32"}
    matrix = {"complete": False, "bugs": [{"bug": "A1", "symptom": "s", "records": [record]}]}
    for _ in range(COUNT):
        watch(lambda: matrix_from(spoiled(matrix, drawn)), (ValueError,))
    assert watch.refused > COUNT / 2


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest case of each operation."""
    root, source = tmp_path_factory.mktemp("corpus"), corpus.installed()
    manifest = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    (root / "arrays").mkdir()
    chosen: dict[str, Any] = {}
    for case in sorted(manifest["cases"], key=lambda case: sum(int(np.prod(a["shape"])) for a in case["arrays"])):
        chosen.setdefault(case["operation"], case)
    for case in chosen.values():
        for array in case["arrays"]:
            shutil.copy(source / array["file"], root / array["file"])
    (root / "manifest.json").write_text(json.dumps({**manifest, "cases": list(chosen.values())}))
    return root


def verified(root: Path) -> list[Any]:
    """The cases of a corpus, each compared with the reference."""
    found = corpus.load(root)
    for case in found:
        compare(case.operation, case.inputs, case.parameters, case.expected, case.exact)
    return found


def test_manifests(drawn: random.Random, watch: Watch, small_corpus: Path) -> None:
    path = small_corpus / "manifest.json"
    text = path.read_text()
    whole = {case.name: case for case in verified(small_corpus)}
    manifest = json.loads(text)
    try:
        for _ in range(COUNT):
            one = drawn.choice(manifest["cases"])
            files = {array["file"] for array in one["arrays"]}
            odd = spoiled({**manifest, "cases": [spoiled(one, drawn)]} if drawn.random() < 0.8 else manifest, drawn)
            path.write_bytes(raw(json.dumps(odd), drawn) if drawn.random() < 0.9 else raw(mutated(text, drawn), drawn))
            for case in watch(partial(loaded, small_corpus, files), (CorpusError,)) or ():
                for name, values in {**case.inputs, **case.expected}.items():
                    known = {**whole[case.name].inputs, **whole[case.name].expected}
                    assert np.array_equal(values, known[name], equal_nan=True)
    finally:
        path.write_text(text)
    assert watch.refused > COUNT / 4


def loaded(root: Path, files: set[str]) -> list[Any]:
    """As ``verified``, with nothing but ``files`` in the folder of arrays where the manifest lists one case alone."""
    hidden = [path for path in (root / "arrays").iterdir() if f"arrays/{path.name}" not in files]
    aside = root / "aside"
    aside.mkdir(exist_ok=True)
    for path in hidden:
        path.rename(aside / path.name)
    try:
        return verified(root)
    finally:
        for path in aside.iterdir():
            path.rename(root / "arrays" / path.name)


def test_arrays(drawn: random.Random, watch: Watch, small_corpus: Path) -> None:
    """No changed byte is accepted."""
    files = sorted((small_corpus / "arrays").iterdir())
    for _ in range(COUNT // 4):
        file = drawn.choice(files)
        before = file.read_bytes()
        data = bytearray(before)
        data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        file.write_bytes(drawn.choice((bytes(data), before[: drawn.randrange(len(before))], before + b"\0")))
        watch(lambda: corpus.load(small_corpus), (CorpusError,))
        file.write_bytes(before)
    assert watch.accepted == 0
