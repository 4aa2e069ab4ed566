"""A corpus of recorded calls: made, verified, made again with the same bytes, and held against a subject."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.exchange.call import Call
from mla_spec.exchange.sample import Sample
from mla_spec.front.cli import main
from mla_spec.golden.corpus import corpus, recorded
from mla_spec.golden.corpus.compare import COMPUTED
from mla_spec.golden.corpus.error import CorpusError
from mla_spec.operations import (
    absorb,
    merge,
    prefill,
    quantised_decode,
    rank_decode,
    rope,
    sparse,
    write_cache,
)
from mla_spec.operations.case import Case
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.operation import Operation
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.quantised_decode import QuantisedDecodeCase
from mla_spec.operations.rank_decode import RankDecodeCase
from mla_spec.operations.rope import RopeCase
from mla_spec.operations.sparse import SparsePrefillCase
from mla_spec.operations.write_cache import WriteCase
from tests.exchange.test_rows import CASES, whole, whole_call

pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")
from mla_spec.golden.exact.expected import expected

KERNEL = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel(TorchAbsorbed):
    def decode(self, *places, softmax_scale, **options):
        return super().decode(*places, softmax_scale=1.1 * softmax_scale, **options)
"""


BASE: dict[str, Any] = {"dtype": "bfloat16", "num_heads": 2}
SMALL: dict[str, Any] = {**BASE, "kv_lora_rank": 4, "qk_rope_head_dim": 2}
OTHERS: dict[str, tuple[Operation, Case]] = {
    "rank_decode": (rank_decode.OPERATION, RankDecodeCase(**SMALL, seqlens=(7, 3), s=2, ranks=2, rank=1, page_size=2)),
    "prefill": (prefill.OPERATION, PrefillCase(**BASE, seqlens_q=(2, 3), seqlens_k=(4, 3), qk_head_dim=4)),
    "prefill, sinks and a window": (
        prefill.OPERATION,
        PrefillCase(**BASE, seqlens_q=(3,), seqlens_k=(6,), qk_head_dim=4, sink="infinite", window=3),
    ),
    "merge": (merge.OPERATION, MergeCase(**BASE, parts=3, batch=2, s=2, head_dim_v=3, empty=0.3)),
    "rope": (rope.OPERATION, RopeCase(dtype="float16", batch=2, s=3, heads=2, dim=8, yarn="ratio")),
    "absorb": (absorb.OPERATION, DecodeCase(**SMALL, seqlens=(3,))),
    "write_cache": (
        write_cache.OPERATION,
        WriteCase(dtype="bfloat16", tokens=5, kv_lora_rank=4, qk_rope_head_dim=2, page_size=4),
    ),
    "sparse_prefill": (
        sparse.SPARSE_PREFILL,
        SparsePrefillCase(**SMALL, s_q=3, topk=4, invalid=0.3, with_length=True, sink="finite"),
    ),
    **{
        f"decode_quantized, {layout}": (
            quantised_decode.OPERATION,
            QuantisedDecodeCase(**BASE, seqlens=(5, 2), page_size=4, format=layout),
        )
        for layout in ("fp8_per_tensor", "deepseek_v4", "nvfp4_ds_mla")
    },
}


def written_calls(folder: Path) -> Path:
    """Calls of every kind that a corpus has, and one that no corpus has."""
    kernel = mla_spec.record(TorchAbsorbed(), str(folder), rate=1)
    for operation, call in [*map(whole, CASES), *(each_of(*each) for each in OTHERS.values())]:
        places, options = call.arguments()
        getattr(kernel, operation.name)(*places, **options)
    kernel.merge(torch.ones(2, 3, 1, 2), torch.tensor([[[0.0, 1.0, -math.inf]], [[1.0, 2.0, -math.inf]]]))
    kernel.quantize_cache(torch.ones(4, 576), format="fp8_per_tensor", page_size=4, tensor_scale=1.0)
    assert kernel.recording.taken == len(CASES) + len(OTHERS) + 2
    assert Sample.largest == Sample.whole
    return folder


def each_of(operation: Operation, case: Case) -> tuple[Operation, Call]:
    return operation, whole_call(operation, case)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_calls(tmp_path_factory.mktemp("recorded") / "calls")


@pytest.fixture(scope="module")
def made(calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of these calls."""
    folder = tmp_path_factory.mktemp("made") / "corpus"
    corpus.regenerate(folder, str(calls))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_corpus_has_the_calls_that_it_can_have(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["origin"] == "recorded calls"
    operations = sorted(case["operation"] for case in manifest["cases"])
    assert set(operations) == set(recorded.OPERATIONS)
    assert len(operations) == len(CASES) + len(OTHERS) + 1
    assert {case["purpose"] for case in manifest["cases"]} == {recorded.EXACT}
    assert {name for case in manifest["cases"] for name in case["parameters"]} >= {"layout", "window", "rope", "config"}
    shapes = [a["shape"] for case in manifest["cases"] for a in case["arrays"] if a["name"] == "outs"]
    assert {len(shape) for shape in shapes} == {5}  # a merge of one sequence too
    bounds = json.loads((made / "bounds.json").read_text(encoding="utf-8"))
    assert set(bounds["cases"]) == {
        case["name"] for case in manifest["cases"] if case["operation"] not in recorded.BITWISE
    }


def test_it_is_verified_and_made_again_with_the_same_bytes(made: Path, calls: Path) -> None:
    before = contents(made)
    assert f"{len(CASES) + len(OTHERS) + 1} cases" in corpus.verify(made)
    assert corpus.regenerate(made) == "nothing changed"
    again = corpus.regenerate(made, str(calls)).splitlines()
    assert again[0] == "nothing changed"
    assert [line.partition(": ")[2] for line in again[1:]] == [
        "what quantize_cache must give does not follow from its arguments"
    ]
    assert contents(made) == before


def test_a_wrong_answer_is_found_and_mended(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, folder := tmp_path / "corpus")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    arrays = [a for case in manifest["cases"] if case["operation"] == "decode" for a in case["arrays"]]
    entry = next(a for a in arrays if a["name"] == "out")
    path = folder / entry["file"]
    data = bytearray(path.read_bytes())
    values: Any = np.frombuffer(bytes(data[-8:]), dtype="<f8") * (1 + 1e-9)
    data[-8:] = values.tobytes()
    path.write_bytes(bytes(data))
    with pytest.raises(CorpusError):
        corpus.verify(folder)
    length = 8 * int(np.prod(entry["shape"]))
    entry["sha256"] = corpus.arrays.sha256(bytes(data[-length:]))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="out"):
        corpus.verify(folder)
    assert set(corpus.regenerate(folder).splitlines()) == {f"changed {entry['file']}", "changed manifest.json"}
    assert contents(folder) == contents(made)


def test_large_answers_are_those_of_float64_and_say_so(
    made: Path, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "MOST", 0)
    corpus.regenerate(tmp_path / "corpus", str(calls))
    exact, plain = corpus.load(made), corpus.load(tmp_path / "corpus")
    assert {case.purpose for case in plain} == {recorded.FLOAT64}
    differ = 0
    for a, b in zip(exact, plain, strict=True):
        for found in COMPUTED[b.operation](b.inputs, b.parameters):
            want, got = a.expected[found.name], b.expected[found.name]
            np.testing.assert_array_equal(got, found.value)
            with np.errstate(invalid="ignore"):  # of two infinities
                assert ((np.abs(got - want) <= found.error) | (got == want)).all()
            differ += int((got != want).sum())
    assert differ
    corpus.verify(tmp_path / "corpus")
    assert corpus.regenerate(tmp_path / "corpus") == "nothing changed"


def test_subjects_are_held_against_it(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL, encoding="utf-8")
    assert main(["golden", "check", "torch-absorbed", "--dir", str(made)]) == 0
    assert main(["golden", "check", f"{tmp_path}/kernel.py:Kernel", "--dir", str(made)]) == 1
    assert "catches: whatever differs from what was recorded" in capsys.readouterr().out


def test_the_commands_of_the_page_do_what_it_says(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(mla-spec golden regenerate.*?)```", page, flags=re.DOTALL)
    shutil.copytree(calls, tmp_path / "recorded")
    (tmp_path / "my_kernel.py").write_text(KERNEL.replace("1.1 * ", ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        assert main(line.partition(" #")[0].split()[1:]) == 0


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"q": torch.full((2, 2, 2, 6), math.nan)}, "out must have elements that are no numbers"),
        ({"block_table": torch.full((2, 9), 2**30)}, "its arguments make no sense to the reference: "),
        ({"q": torch.zeros(2, 2, 2, 6).to(torch.float8_e5m2)}, r"q is float8_e5m2 \[2, 2, 2, 6\]; a corpus holds "),
        ({"window": 2**17}, "parameter window is 131072; expected at most 65536"),
    ],
)
def test_a_call_that_no_corpus_can_have_says_why(changed: dict[str, Any], why: str) -> None:
    call = whole_call(DECODE, DecodeCase(**SMALL, seqlens=(5, 3), s=2, page_size=4))
    values = {name: value for name, value in changed.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: value for name, value in changed.items() if name not in values}
    assert recorded.case_of(call).purpose == recorded.EXACT
    with pytest.raises(recorded.Unfit, match=why):
        recorded.case_of(replace(call, tensors={**call.tensors, **tensors}, values={**call.values, **values}))


def test_unread_bytes_of_pages_may_be_no_numbers() -> None:
    case = QuantisedDecodeCase(**BASE, seqlens=(3,), page_size=4, format="fp8_ds_mla")
    call = whole_call(quantised_decode.OPERATION, case)
    pages = call.tensors["pages"].clone()
    pages[:, 656 * 3 :] = 0x7F  # the fourth token: codes that are NaN, a scale that is none
    found = [
        recorded.case_of(replace(call, tensors={**call.tensors, "pages": p})) for p in (call.tensors["pages"], pages)
    ]
    one, other = (recorded.answers(each, expected) for each in found)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_cannot_be_a_corpus_is_said(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"), rate=1)
    kernel.quantize_cache(torch.ones(4, 576), format="fp8_per_tensor", page_size=4, tensor_scale=1.0)
    new = str(tmp_path / "new")
    assert main(["golden", "regenerate", "--dir", new, "--calls", str(tmp_path / "calls")]) == 1
    assert "holds no call that a corpus can have, of rope, absorb, prefill, decode, " in capsys.readouterr().err
    assert main(["golden", "regenerate", "--dir", new, "--calls", str(tmp_path)]) == 1
    assert "holds no recorded calls" in capsys.readouterr().err
    assert not Path(new).exists()
    assert main(["golden", "verify", "--dir", str(made), "--calls", str(tmp_path)]) == 2
    assert main(["golden", "regenerate", "--calls", str(tmp_path)]) == 2
    assert "--calls is of golden regenerate, into the corpus that --dir names" in capsys.readouterr().err
