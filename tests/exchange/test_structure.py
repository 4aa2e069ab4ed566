"""Calls recorded without their tensors: what is written, what is drawn of it, and what is judged."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.exchange import structure
from mla_spec.exchange.call import Call, address, read_call
from mla_spec.exchange.folder import ANSWERS, CALLS
from mla_spec.exchange.structure import drawn, structure_of
from mla_spec.exchange.tensor_file import ExchangeError, decode, encode
from mla_spec.front.cli import main
from tests.exchange.test_record import LosesPage, arguments
from tests.exchange.test_replay import LOSES_PAGE, kernel_file, replayed
from tests.exchange.test_rows import CASES, whole


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A call of a kernel that loses a page, without its tensors."""
    places, options = arguments()
    kernel = mla_spec.record(LosesPage(), str(tmp_path / "recorded"), rate=1, tensors=False)
    kernel.decode(*places, **options)
    assert kernel.recording.taken == 1
    return tmp_path / "recorded"


def the_file(folder: Path) -> Path:
    (path,) = (folder / CALLS).iterdir()
    return path


def test_no_number_of_a_tensor_is_written(recorded: Path) -> None:
    (q, cache, table, lengths), options = arguments()
    tensors, texts = decode(the_file(recorded).read_bytes(), "the call")
    assert {name: x.tolist() for name, x in tensors.items()} == {
        "block_table": table.tolist(),
        "cache_seqlens": lengths.tolist(),
    }
    assert the_file(recorded).stat().st_size < 8192 < cache.numel() * cache.element_size()
    said = json.loads(texts["moments.q"])
    assert said["shape"] == list(q.shape)
    assert said["mean"] == pytest.approx(float(q.double().mean()))
    assert said["most"] == float(q.max())
    assert json.loads(texts["softmax_scale"]) == options["softmax_scale"]
    assert not list((recorded / ANSWERS).iterdir())


def test_moments_of_a_cache_are_of_the_pages_that_are_needed() -> None:
    _, call = whole("decode")
    used = structure_of(call)
    pool = call.tensors["kv_cache"].clone()
    needed = torch.zeros(len(pool), dtype=torch.bool)
    for row, n in zip(call.tensors["block_table"], call.tensors["cache_seqlens"].tolist(), strict=True):
        needed[row[: -(-n // pool.shape[1])].long()] = True
    pool[~needed] = 1e6
    assert not needed.all()
    again = structure_of(Call(call.operation, {**call.tensors, "kv_cache": pool}, call.values))
    assert used is not None
    assert again is not None
    assert used.moments == again.moments


@pytest.mark.parametrize("name", [name for name in CASES if name != "decode_quantized"])
def test_what_is_drawn_has_the_shapes_and_moments_and_is_the_same_each_time(name: str) -> None:
    _, call = whole(name)
    kept = structure_of(call)
    assert kept is not None
    read = read_call(kept.encoded(), "the call")
    made, again = drawn(read, "the call"), drawn(read, "the call")
    for key, x in call.tensors.items():
        assert made.tensors[key].shape == x.shape
        assert made.tensors[key].dtype == x.dtype
        assert torch.equal(made.tensors[key], again.tensors[key])
        if key in read.moments:
            found = read.moments[key]
            assert found.least <= float(made.tensors[key].min()) <= float(made.tensors[key].max()) <= found.most
            if x.numel() > 100:
                assert abs(float(made.tensors[key].double().mean()) - found.mean) < 5 * found.std / x.numel() ** 0.5
        else:
            assert torch.equal(made.tensors[key], x)


def test_a_cache_that_is_too_large_has_the_needed_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = whole("decode")
    kept = structure_of(call)
    assert kept is not None
    moments = {**kept.moments, "kv_cache": replace(kept.moments["kv_cache"], shape=(2**40, 4, 1, 7))}
    large = read_call(Call(kept.operation, kept.tensors, kept.values, moments=moments).encoded(), "the call")
    made = drawn(large, "the call")
    pages = sum(-(-n // 4) for n in call.tensors["cache_seqlens"].tolist())
    assert made.tensors["kv_cache"].shape == (pages, 4, 1, 7)
    monkeypatch.setattr(structure, "LARGEST", 100)
    with pytest.raises(ExchangeError, match=r"its tensors need [0-9]+ bytes; expected at most 100"):
        drawn(large, "the call")


def test_such_calls_are_run_judged_and_made_smaller(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replayed(recorded, "torch-absorbed") == (0, [("replayed call", "pass", "")])
    code, ((_, verdict, _),) = replayed(recorded, kernel_file(recorded.parent, LOSES_PAGE))
    assert (code, verdict) == (1, "fail")
    assert f"lengths [{5 * 64 + 1}]" in capsys.readouterr().out
    assert main(["judge", str(recorded)]) == 3
    assert "it has no answer" in capsys.readouterr().out


def test_calls_of_bytes_are_left_out_and_counted(tmp_path: Path) -> None:
    operation, call = whole("decode_quantized")
    kernel = mla_spec.record(TorchAbsorbed(), str(tmp_path / "recorded"), rate=1, tensors=False)
    places, options = call.arguments()
    getattr(kernel, operation.name)(*places, **options)
    assert (kernel.recording.of_bytes, kernel.recording.taken, kernel.recording.full) == (1, 0, "")


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"std": -1.0}, "expected std >= 0"),
    ({"least": 9e9}, "expected std >= 0 and least <= most"),
    ({"dtype": "I32"}, "dtype is 'I32'; expected one of F64"),
    ({"shape": [-1]}, "shape"),
    ({"shape": [2**62, 2**62]}, "fewer than 2^62 elements"),
    ({"shape": [2**40]}, "bytes; expected at most 1073741824"),
    ({"mean": "0"}, "mean is '0'; expected a finite number"),
    ({"mode": 1}, "unknown field 'mode'"),
]


@pytest.mark.parametrize(("changed", "says"), DAMAGED)
def test_damaged_moments_are_one_sentence(
    changed: dict[str, Any], says: str, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = the_file(recorded)
    tensors, texts = decode(path.read_bytes(), "the call")
    texts["moments.q"] = json.dumps({**json.loads(texts["moments.q"]), **changed})
    data = encode(tensors, texts)
    index = recorded / "calls.jsonl"
    index.write_text(index.read_text(encoding="utf-8").replace(path.stem, address(data)), encoding="utf-8")
    path.unlink()
    (path.parent / f"{address(data)}.safetensors").write_bytes(data)
    assert main(["judge", str(recorded)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_tables_that_make_no_sense_are_one_sentence() -> None:
    _, call = whole("decode")
    kept = structure_of(call)
    assert kept is not None
    table = torch.full_like(call.tensors["block_table"], random.Random(0).randrange(2**29, 2**30))
    moments = {**kept.moments, "kv_cache": replace(kept.moments["kv_cache"], shape=(2**28, 4, 1, 7))}
    wrong = Call(kept.operation, {**kept.tensors, "block_table": table}, kept.values, moments=moments)
    with pytest.raises(ExchangeError, match="its tables and lengths make no sense"):
        drawn(read_call(wrong.encoded(), "the call"), "the call")
