"""mla_spec.audit: honest kernels give no alarm, faults are found when the report says, and the caller never notices."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.front.cli import main
from mla_spec.judging.audit import HEADS, LINES, METRICS, WAITING, Auditing
from mla_spec.judging.audit_counts import calls_until_met, false_alarms, level

OPTIONS: dict[str, Any] = {"head_dim_v": 16, "softmax_scale": 24**-0.5, "causal": True}


def arguments(seed: int, heads: int = 4, b: int = 2, keys: int = 40) -> tuple[Tensor, ...]:
    """A decode of sequences in pages of 16, whose latents have no mean."""
    drawn = torch.Generator().manual_seed(seed)
    pages = -(-keys // 16)
    q = torch.randn(b, 1, heads, 24, generator=drawn).bfloat16()
    cache = torch.randn(b * pages, 16, 1, 24, generator=drawn).bfloat16()
    table = torch.randperm(b * pages, generator=drawn).int().reshape(b, pages)
    return q, cache, table, torch.full((b,), keys, dtype=torch.int32)


class OneHead(TorchAbsorbed):
    """Its head 3 has another scale."""

    def decode(self, q: Tensor, *rest: Tensor, **options: Any) -> Any:
        q = q.clone()
        q[:, :, 3] *= 1.25
        return super().decode(q, *rest, **options)


class FlippedBit(TorchAbsorbed):
    """Reads one element of the cache with its highest bit of exponent flipped."""

    def decode(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, *rest: Tensor, **options: Any) -> Any:
        read = kv_cache.clone()
        page = int(block_table[0, 1])
        read.view(torch.int16)[page, 3, 0, 20] ^= 1 << 14
        return super().decode(q, read, block_table, *rest, **options)


def settle(auditing: Auditing) -> None:
    """Wait until what was taken is judged and told, so that nothing is dropped."""
    auditing._waiting.join()


def audited(kernel: Any, tmp_path: Path, **options: Any) -> Any:
    return mla_spec.audit(kernel, **{"directory": str(tmp_path / "audit"), "seed": 0, **options})


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "audit" / LINES).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_an_honest_kernel_gives_no_alarm(tmp_path: Path) -> None:
    kernel = audited(TorchAbsorbed(), tmp_path, rate=0.1, on_violation=pytest.fail)
    places = [arguments(seed) for seed in range(20)]
    for i in range(3000):
        kernel.decode(*places[i % 20], **OPTIONS)
        if i % 10 == 0:
            settle(kernel.auditing)
    kernel.auditing.close()
    counts = kernel.auditing.counts
    assert counts.judged.keys() == {("decode", "pass")}
    assert counts.held + counts.dropped == kernel.auditing.taken
    assert counts.held > 200
    assert (counts.violations, kernel.auditing.calls) == (0, 3000)
    *_, last = lines(tmp_path)
    assert last["calls"] == 3000
    assert 0 < last["margins"]["decode lse"]["largest"] < 1
    assert sum(last["margins"]["decode out"]["cells"]) == counts.held


@pytest.mark.parametrize("heads", [16, 64])
def test_a_fault_in_one_head_is_found_within_the_calls_of_the_report(heads: int, tmp_path: Path) -> None:
    kernel = audited(OneHead(), tmp_path, rate=0.2, seed=1)
    predicted = kernel.auditing.calls_until_met(HEADS / heads)
    assert predicted == {16: 21, 64: 90}[heads]
    places = arguments(0, heads)
    while kernel.auditing.counts.violations == 0:
        kernel.decode(*places, **OPTIONS)
        settle(kernel.auditing)
        assert kernel.auditing.calls <= predicted
    assert f"in one head of {heads} is in a judged row within" in kernel.auditing.report()
    kernel.auditing.close()
    (violation,) = [line for line in lines(tmp_path) if line["type"] == "violation"]
    assert violation["message"].startswith("lse[")
    assert violation["proof"]


def test_a_flipped_bit_of_one_row_is_found_and_its_call_judged_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    kernel = audited(FlippedBit(), tmp_path, rate=1, on_violation=told.append)
    for seed in range(8):  # each time one of two sequences, of which the first has the row
        kernel.decode(*arguments(seed), **OPTIONS)
        settle(kernel.auditing)
    kernel.auditing.close()
    assert 0 < len(told) == kernel.auditing.counts.violations < 8
    first = told[0]
    assert first["operation"] == "decode"
    assert first["proof"]
    capsys.readouterr()
    assert main(first["judge"].split()[1:]) == 1
    out = capsys.readouterr().out
    assert first["message"].splitlines()[0] in out
    assert first["call"][:12] in out
    assert out.count(" fail ") == len(told)


def test_rows_are_those_of_the_moment_of_the_call(tmp_path: Path) -> None:
    kernel = audited(TorchAbsorbed(), tmp_path, rate=1, on_violation=pytest.fail)
    q, cache, *rest = arguments(0)
    for _ in range(4):
        out, lse = kernel.decode(q, cache, *rest, **OPTIONS)
        for x in (q, cache, out, lse):
            x.zero_()
        q, cache, *rest = arguments(1)
    settle(kernel.auditing)
    kernel.auditing.close()
    assert kernel.auditing.counts.judged == {("decode", "pass"): 4}


def test_too_many_calls_are_dropped_and_counted_and_nobody_waits(tmp_path: Path) -> None:
    kernel, places = audited(TorchAbsorbed(), tmp_path, rate=1), arguments(0)
    for _ in range(100):  # the judging process has not even begun
        kernel.decode(*places, **OPTIONS)
    dropped = kernel.auditing.counts.dropped
    kernel.auditing.close()
    counts = kernel.auditing.counts
    assert kernel.auditing.taken == 100 == dropped + counts.held
    assert dropped >= 100 - WAITING - 1 - counts.held
    assert dropped > 0
    assert kernel.auditing.calls_until_met() == math.ceil(math.log(0.01) / math.log(1 - counts.held / 100))


def test_nothing_of_the_audit_reaches_the_caller(tmp_path: Path) -> None:
    def rude(_: dict[str, Any]) -> None:
        raise RuntimeError("rude")

    kernel, places = audited(OneHead(), tmp_path, rate=1, on_violation=rude), arguments(0)
    out, _ = kernel.decode(*places, **OPTIONS)
    with pytest.warns(UserWarning, match="on_violation raised RuntimeError: rude"):
        settle(kernel.auditing)
    assert torch.equal(out, OneHead().decode(*places, **OPTIONS)[0])
    kernel.auditing._worker._running.kill()
    kernel.decode(*places, **OPTIONS)
    settle(kernel.auditing)
    assert kernel.auditing.counts.dropped == 1
    kernel.decode(*arguments(1), **OPTIONS)  # another process judges on
    with pytest.warns(UserWarning, match="on_violation raised"):
        kernel.auditing.close()
    assert kernel.auditing.counts.violations == 2
    with pytest.raises(TypeError):
        kernel.decode()


def test_a_folder_that_is_gone_ends_the_audit_with_a_warning(tmp_path: Path) -> None:
    kernel, places = audited(TorchAbsorbed(), tmp_path, rate=1), arguments(0)
    shutil.rmtree(tmp_path / "audit")
    for _ in range(3):
        kernel.decode(*places, **OPTIONS)
    with pytest.warns(UserWarning, match=r"mla_spec\.audit: no more calls are judged: .*audit"):
        settle(kernel.auditing)
    kernel.auditing.close()
    assert kernel.auditing.full
    kernel.decode(*places, **OPTIONS)


ENDS = """
import os, signal, sys, time
import torch, mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed

kernel = mla_spec.audit(TorchAbsorbed(), rate=1, directory=sys.argv[1])
kernel.merge(torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1))
while not kernel.auditing.counts.held:
    time.sleep(0.01)
print(kernel.auditing._worker._running.pid, flush=True)
if sys.argv[2] == "killed":
    if os.fork() == 0:  # a child that holds the pipe
        time.sleep(30)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["returns", "killed"])
def test_the_judging_process_ends_with_its_caller(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS, str(tmp_path / "audit"), how]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    worker = int(done.stdout.readline())
    assert done.wait(60) == (0 if how == "returns" else -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and " Z " not in Path(f"/proc/{worker}/stat").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == "returns":
        assert lines(tmp_path)[-1]["judged"] == {"merge pass": 1}


def test_metrics_are_of_the_text_format_and_of_the_counts(tmp_path: Path) -> None:
    class Named(OneHead):
        name = 'odd "name" \\ here'

    kernel, places = audited(Named(), tmp_path, rate=1), arguments(0)
    for _ in range(3):
        kernel.decode(*places, **OPTIONS)
        settle(kernel.auditing)
    kernel.auditing.close()
    text = (tmp_path / "audit" / METRICS).read_text(encoding="utf-8")
    sample = re.compile(r'^[a-z_]+\{[a-z_]+="(?:[^"\\\n]|\\.)*"(?:,[a-z_]+="(?:[^"\\\n]|\\.)*")*\} [0-9.e+-]+$')
    samples = [line for line in text.splitlines() if not line.startswith("# ")]
    assert [line for line in samples if not sample.match(line)] == []
    for what, value in {
        "calls_total": 3,
        r"judged_total.*operation=\"decode\",verdict=\"fail\"": 3,
        r"violations_total.*bound=\"worst case\"": 3,
        r"error_over_bound_bucket.*output=\"lse\",le=\"1\.0\"": 0,
        r"error_over_bound_bucket.*output=\"lse\",le=\"\+Inf\"": 3,
        r"error_over_bound_count.*output=\"lse\"": 3,
    }.items():
        assert [line.rpartition(" ")[2] for line in samples if re.search(what, line)] == [str(value)], what


def test_the_levels_of_a_run_add_up_to_what_is_said() -> None:
    total, eight_roundings = Fraction(0), Fraction(8, 2**53)
    for k in range(1, 5001):
        total += min(Fraction(1e-9), Fraction(1e-6) / (k * (k + 1)))
        assert level(k) == min(1e-9, 1e-6 / (k * (k + 1)))
        if k in (1, 30, 31, 32, 33, 5000):
            assert abs(Fraction(false_alarms(k)) - total) <= eight_roundings * total
    assert false_alarms(0) == 0
    assert false_alarms(10**15) < 1e-7


def test_calls_until_a_fault_is_met_are_those_of_a_geometric_distribution() -> None:
    n = calls_until_met(0.01, 0.25)
    assert n is not None
    assert (1 - 0.0025) ** n <= 0.01 < (1 - 0.0025) ** (n - 1)
    assert calls_until_met(1, 1) == 1
    assert calls_until_met(0, 1) is None


def test_rate_and_folder_are_asked_for_as_record_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rate is -1; expected a share"):
        mla_spec.audit(TorchAbsorbed(), rate=-1)
    monkeypatch.chdir(tmp_path)
    decode = mla_spec.audit(TorchAbsorbed().decode, operation="decode", rate=0)
    out, _ = decode(*arguments(0), **OPTIONS)
    assert out.shape == (2, 1, 4, 16)
    assert (decode.auditing.calls, decode.auditing.taken) == (1, 0)
    (folder,) = (tmp_path / "mla-spec-audit").iterdir()
    assert f"-{os.getpid()}-" in folder.name


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {"kernel": TorchAbsorbed(), "decode": TorchAbsorbed().decode})
    assert "0 calls, 0 taken, 0 judged" in capsys.readouterr().out
