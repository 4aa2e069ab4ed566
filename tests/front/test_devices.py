"""Several devices: one worker each, the same verdicts as on one, and what cannot be used is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mla_spec.front.cli import main
from mla_spec.front.device import devices_of
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.subjects.driver import _elsewhere
from mla_spec.text.terminal import UsageError

LAWS = ("test_rope_preserves_norm", "test_merge_is_associative", "test_absorb_splits_kv_b_proj")


def checked(device: str, folder: Path) -> tuple[list[tuple[str, str, int]], dict[str, str]]:
    """What came of each law, and the line of the run."""
    out = folder / f"{device}.jsonl"
    laws = [word for law in LAWS for word in ("--law", law)]
    line = [
        "check",
        "torch-absorbed",
        *laws,
        "--examples",
        "8",
        "--dtype",
        "float32",
        "--seed",
        "0",
        "--device",
        device,
        "--jobs",
        "1",
    ]
    assert main([*line, "--records", str(out)]) == 0
    lines = [json.loads(each) for each in out.read_text().splitlines()]
    verdicts = [(each["law"], each["verdict"], each["cases"]) for each in lines if each["type"] == "verdict"]
    return sorted(verdicts), lines[0]


def test_verdicts_do_not_depend_on_the_number_of_devices(tmp_path: Path) -> None:
    one, first = checked("cpu", tmp_path)
    two, second = checked("cpu,cpu", tmp_path)
    assert one == two
    assert (first["device"], second["device"], second["gpu"]) == ("cpu", "cpu,cpu", None)


def test_each_device_has_a_worker() -> None:
    """Laws that run on a device without contents fail there, and only there; each has two laws, and both run at once."""
    options = Options(examples=2, dtypes=("float32",), minimise=False, spec=("torch-absorbed",))
    with WorkerPool(1, 300, devices=("cpu", "meta")) as pool:
        futures = [pool.submit("test_rope_preserves_norm", "torch-absorbed", options) for _ in range(8)]
        records = [future.result() for future in futures]
    passed = [record for record in records if record.verdict == "pass"]
    failed = [record for record in records if record.verdict != "pass"]
    assert passed and failed
    assert all(record.replay.endswith(" --device meta") for record in failed), failed[0].text()


@pytest.mark.parametrize(
    ("found", "own", "elsewhere"),
    [
        ("cuda:1", "cuda:0", True),
        ("cuda:1", "cuda:1", False),
        ("cuda:1", "cuda", False),
        ("cpu", "cuda:0", True),
        ("cpu", "cpu:0", False),
    ],
)
def test_a_tensor_on_another_device_of_its_kind_is_odd(found: str, own: str, elsewhere: bool) -> None:
    assert _elsewhere(torch.device(found), torch.device(own)) is elsewhere


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("text", ["cuda:*", "cpu,cuda:7", "cpu,", "", "cpu,nowhere"])
def test_a_device_that_is_not_there_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        devices_of(text)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["check", "torch-absorbed", "--in-process"], "--in-process has one device"),
        (["campaign", "torch-absorbed", "--ray", "local"], "--ray gives each task a GPU itself"),
    ],
)
def test_what_has_one_device_says_so(line: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*line, "--device", "cpu,cpu"]) == 2
    assert says in capsys.readouterr().err
