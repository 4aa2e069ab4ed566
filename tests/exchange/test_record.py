"""mla_spec.record: a sample of real calls, judged; it never changes or ends a call."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.exchange.folder import ANSWERS, CALLS
from mla_spec.exchange.sample import Sample
from mla_spec.front.cli import main
from tests.exchange.test_rows import CASES
from tests.exchange.test_rows import whole as whole_call_of


def arguments(b: int = 2, keys: int = 640) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """A decode of sequences in pages of 64, whose latents have no mean, as real ones."""
    drawn = torch.Generator().manual_seed(0)
    pages = keys // 64
    q = torch.randn(b, 1, 4, 72, generator=drawn).bfloat16()
    cache = torch.randn(b * pages, 64, 1, 72, generator=drawn).bfloat16()
    table = torch.randperm(b * pages, generator=drawn).int().reshape(b, pages)
    lengths = torch.full((b,), keys, dtype=torch.int32)
    return (q, cache, table, lengths), {"head_dim_v": 64, "softmax_scale": 72**-0.5, "causal": True}


class LosesPage(TorchAbsorbed):
    """Reads one page twice, in place of the next."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
        table = block_table.clone()
        table[:, 5] = table[:, 4]
        return super().decode(q, kv_cache, table, cache_seqlens, **options)


def judged(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    out = folder.parent / "judged.json"
    code = main(["judge", str(folder), "--json", str(out)])
    return code, json.loads(out.read_text(encoding="utf-8"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for name in (CALLS, ANSWERS) for path in (folder / name).iterdir())


def test_calls_are_the_kernels_own_and_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel, folder = TorchAbsorbed(), tmp_path / "calls"
    recorded = mla_spec.record(kernel, str(folder), rate=1)
    places, options = arguments()
    got, want = recorded.decode(*places, **options), kernel.decode(*places, **options)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    assert recorded.profile is kernel.profile
    assert (recorded.recording.taken, recorded.recording.full) == (1, "")
    code, (record,) = judged(folder)
    assert (code, record["verdict"]) == (0, "pass")
    assert record["worst"] > 0
    out = capsys.readouterr().out
    assert "is the worst element" in out
    assert "decode: an error of lse up to" in out


def test_arguments_are_those_before_the_call(tmp_path: Path) -> None:
    folder, pool = tmp_path / "calls", torch.zeros(2, 2, 1, 5)
    recorded = mla_spec.record(TorchAbsorbed(), str(folder), rate=1)
    recorded.write_cache(torch.ones(2, 3), k_pe=torch.ones(2, 2), kv_cache=pool, slot_mapping=torch.tensor([3, -1]))
    assert pool[1, 1].eq(1).all()
    assert judged(folder)[0] == 0
    pool.zero_()
    lost = mla_spec.record(
        lambda latent, k_pe, kv_cache, slot_mapping: None, str(tmp_path / "lost"), rate=1, operation="write_cache"
    )
    lost(torch.ones(2, 3), torch.ones(2, 2), pool, torch.tensor([3, -1]))
    code, (record,) = judged(tmp_path / "lost")
    assert (code, record["verdict"]) == (1, "fail")
    assert "5 of 20 elements are not exactly what they must be" in record["message"]


def test_a_lost_page_is_seen_by_the_lse(tmp_path: Path) -> None:
    recorded = mla_spec.record(LosesPage(), str(tmp_path / "calls"), rate=1)
    places, options = arguments()
    recorded.decode(*places, **options)
    code, (record,) = judged(tmp_path / "calls")
    assert (code, record["verdict"]) == (1, "fail")
    assert record["message"].startswith("lse[")


@pytest.mark.parametrize(("kernel", "code"), [(TorchAbsorbed(), 0), (LosesPage(), 1)], ids=["honest", "loses a page"])
def test_of_a_large_decode_one_sequence_is_kept(
    kernel: TorchAbsorbed, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, options = arguments(b=4)
    whole = sum(x.numel() * x.element_size() for x in places)
    for name in ("whole", "largest"):
        monkeypatch.setattr(Sample, name, whole // 3)
    recorded = mla_spec.record(kernel, str(tmp_path / "calls"), rate=1, seed=0)
    recorded.decode(*places, **options)
    recorded.merge(torch.zeros(2, 100, 100, 30), torch.zeros(2, 100, 100))
    assert (recorded.recording.taken, recorded.recording.too_large) == (1, 1)
    assert size(tmp_path / "calls") < whole / 3
    assert judged(tmp_path / "calls")[0] == code


def test_the_sample_has_the_rate_and_the_bytes_that_are_asked_for(tmp_path: Path) -> None:
    half = mla_spec.record(TorchAbsorbed(), str(tmp_path / "half"), rate=0.5, seed=0)
    none = mla_spec.record(TorchAbsorbed(), str(tmp_path / "none"), rate=0)
    few = mla_spec.record(TorchAbsorbed(), str(tmp_path / "few"), rate=1, most=2000)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(100):
            for each in (half, none, few):
                each.merge(torch.full((1, 1, 1, 1), float(i)), torch.zeros(1, 1, 1))
    assert 30 <= half.recording.taken <= 70
    assert none.recording.taken == 0
    assert 0 < size(tmp_path / "few") <= 2000
    assert [str(each.message) for each in told] == [
        f"mla_spec.record: nothing more is recorded in {tmp_path / 'few'}: its files would exceed 2000 bytes"
    ]


def test_what_goes_wrong_with_files_is_not_the_calls(tmp_path: Path) -> None:
    recorded = mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"), rate=1)
    shutil.rmtree(tmp_path / "calls")
    with pytest.warns(UserWarning, match="nothing more is recorded"):
        out, _ = recorded.merge(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    assert out.item() == 1
    assert recorded.recording.full


@pytest.mark.parametrize(
    ("kernel", "options", "says"),
    [
        (TorchAbsorbed(), {"rate": 2}, "rate is 2; expected a share"),
        (object(), {}, "object offers no operation"),
        (max, {}, "name that of a function"),
    ],
)
def test_what_cannot_be_recorded_is_said(kernel: Any, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        mla_spec.record(kernel, str(tmp_path / "calls"), **options)
    assert not (tmp_path / "calls").exists()


def test_a_folder_is_recorded_into_once(tmp_path: Path) -> None:
    mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"))
    with pytest.raises(ValueError, match="expected a new folder"):
        mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"))


def test_options_of_laws_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mla_spec.record(TorchAbsorbed(), str(tmp_path / "calls"))
    assert main(["judge", str(tmp_path / "calls"), "--law", "decode"]) == 2
    assert "--law is of laws" in capsys.readouterr().err
    assert main(["judge", str(tmp_path / "calls")]) == 3


def test_recorded_calls_are_answered_again_by_another_kernel(tmp_path: Path) -> None:
    recorded = mla_spec.record(LosesPage(), str(tmp_path / "recorded"), rate=1)
    places, options = arguments()
    recorded.decode(*places, **options)
    assert main(["answer", str(tmp_path / "recorded"), "torch-absorbed", "--into", str(tmp_path / "again")]) == 0
    assert judged(tmp_path / "again")[0] == 0
    assert judged(tmp_path / "recorded")[0] == 1
    assert main(["answer", str(tmp_path / "recorded"), "torch-absorbed", "--into", str(tmp_path / "again")]) == 2


def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(mla-spec judge recorded.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    places, options = arguments()
    mla_spec.record(TorchAbsorbed(), "recorded", rate=1).decode(*places, **options)
    for line in block.splitlines():
        assert main(line.partition(" #")[0].split()[1:]) == 0


@pytest.mark.parametrize(("stretch", "verdict"), [(1.0, "pass"), (1.25, "fail")], ids=["honest", "another scale"])
@pytest.mark.parametrize("name", CASES)
def test_rows_of_every_attention_over_a_cache_are_judged(
    name: str, stretch: float, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sample, "whole", 0)
    operation, call = whole_call_of(name)
    places, options = call.arguments()
    honest = TorchAbsorbed()

    def method(*places: Any, softmax_scale: float, **options: Any) -> Any:
        return getattr(honest, operation.name)(*places, softmax_scale=stretch * softmax_scale, **options)

    kernel = SimpleNamespace(profile=honest.profile, supports=honest.supports, **{operation.name: method})
    recorded = mla_spec.record(kernel, str(tmp_path / "calls"), rate=1, seed=0)
    for _ in range(4):
        getattr(recorded, operation.name)(*places, **options)
    code, records = judged(tmp_path / "calls")
    assert code == (verdict == "fail")
    assert verdict in {record["verdict"] for record in records} <= {verdict, "pass"}


@pytest.mark.parametrize(("wrong", "verdicts"), [(False, {"pass"}), (True, {"fail"})])
def test_packed_queries_and_the_tokens_of_a_rank_are_judged(wrong: bool, verdicts: set[str], tmp_path: Path) -> None:
    (q, cache, table, lengths), options = arguments()
    read = table.flip(0) if wrong else table
    honest, folder = TorchAbsorbed(), tmp_path / "calls"

    class Kernel:
        profile, supports = honest.profile, honest.supports

        def ragged_decode(self, q: Tensor, cache: Tensor, table: Tensor, *rest: Tensor, **options: Any) -> Any:
            return honest.ragged_decode(q, cache, read, *rest, **options)

        def rank_decode(self, q: Tensor, cache: Tensor, table: Tensor, *rest: Tensor, **options: Any) -> Any:
            return honest.rank_decode(q, cache, read, *rest, **options)

    recorded = mla_spec.record(Kernel(), str(folder), rate=1)
    starts = torch.tensor([0, 1, len(q)], dtype=torch.int32)
    recorded.ragged_decode(q[:, 0], cache, table, lengths, starts, **options)
    recorded.rank_decode(q, cache, table, 2 * lengths, ranks=2, rank=1, interleave=1, **options)
    code, records = judged(folder)
    assert {record["verdict"] for record in records} == verdicts
    assert len(records) == 2
    assert code == (1 if wrong else 0)
