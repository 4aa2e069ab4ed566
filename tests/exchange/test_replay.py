"""replay: recorded calls and dumps of others run again, and a failing one made smaller."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import mla_spec
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.exchange.call import Call
from mla_spec.exchange.contents import answer_by, read_answer
from mla_spec.exchange.declared import Declared
from mla_spec.exchange.flashinfer_dumps import parameters
from mla_spec.exchange.folder import Folder, read_calls
from mla_spec.exchange.smaller import smaller, smallest
from mla_spec.front.cli import main
from mla_spec.judging.recorded import judge_answer
from mla_spec.operations.all import OPERATIONS
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.operation import Operation
from mla_spec.operations.prefill import PrefillCase
from mla_spec.subjects.supports import Supports
from tests.exchange.test_record import LosesPage, arguments, judged
from tests.exchange.test_rows import CASES, whole_call

LOSES_PAGE = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel(TorchAbsorbed):
    def decode(self, q, kv_cache, block_table, cache_seqlens, **options):
        table = block_table.clone()
        if table.shape[1] > 5:
            table[:, 5] = table[:, 4]
        return super().decode(q, kv_cache, table, cache_seqlens, **options)
"""

HEAD = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel(TorchAbsorbed):
    def decode(self, q, *rest, **options):
        q = q.clone()
        q[:, :, 1:] *= {factor}
        return super().decode(q, *rest, **options)
"""

ENDS = """
import os
from mla_spec.adapters.pytorch import TorchAbsorbed

class Kernel(TorchAbsorbed):
    def decode(self, q, kv_cache, block_table, cache_seqlens, **options):
        if cache_seqlens.max() > 300:
            os._exit(9)
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)
"""


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A call of a kernel that loses a page."""
    places, options = arguments()
    mla_spec.record(LosesPage(), str(tmp_path / "recorded"), rate=1).decode(*places, **options)
    return tmp_path / "recorded"


def kernel_file(folder: Path, text: str) -> str:
    path = folder / "kernel.py"
    path.write_text(text, encoding="utf-8")
    return f"{path}:Kernel"


def replayed(folder: Path, subject: str, *options: str) -> tuple[int, list[tuple[str, str, str]]]:
    """The exit code, and (law, verdict, message) of each record."""
    out = folder.parent / "replayed.json"
    code = main(["replay", str(folder), subject, "--json", str(out), *options])
    records = json.loads(out.read_text(encoding="utf-8"))
    return code, [(record["law"], record["verdict"], record["message"]) for record in records]


def test_a_failing_call_is_made_smaller_and_fails_again(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject, small = kernel_file(recorded.parent, LOSES_PAGE), recorded.parent / "small"
    code, records = replayed(recorded, subject, "--into", str(small))
    assert code == 1
    assert [(law, verdict) for law, verdict, _ in records] == [("recorded call", "fail"), ("replayed call", "fail")]
    assert "smallest failing call: decode: q [1, 1, 1, " in capsys.readouterr().out
    ((_, call),) = read_calls(Folder.opened(str(small)))
    assert call.tensors["cache_seqlens"].tolist() == [5 * 64 + 1]
    assert call.tensors["kv_cache"].shape[0] == 6
    assert judged(small)[0] == 1
    assert replayed(small, subject)[0] == 1
    assert replayed(small, "torch-absorbed")[1][1][:2] == ("replayed call", "pass")


def test_what_passes_now_is_told_from_what_was_recorded(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, records = replayed(recorded, "torch-absorbed", "--into", str(recorded.parent / "none"))
    assert code == 1
    assert [verdict for _, verdict, _ in records] == ["fail", "pass"]
    assert "the subject passes now: what was recorded came of another kernel" in capsys.readouterr().out
    assert not (recorded.parent / "none").exists()


def test_the_smallest_call_becomes_a_script(recorded: Path) -> None:
    subject, script = kernel_file(recorded.parent, HEAD.format(factor=1.25)), recorded.parent / "repro.py"
    assert replayed(recorded, subject, "--export", str(script))[0] == 1
    failing = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (failing.returncode, failing.stderr) == (1, "")
    assert "elements are wrong" in failing.stdout
    kernel_file(recorded.parent, HEAD.format(factor=1))
    assert subprocess.run([sys.executable, str(script)], capture_output=True, check=False).returncode == 0


def test_a_subject_that_ends_is_a_verdict_and_is_made_smaller(recorded: Path) -> None:
    small = recorded.parent / "small"
    code, records = replayed(recorded, kernel_file(recorded.parent, ENDS), "--into", str(small))
    assert code == 1
    assert records[1][1] == "crashed"
    ((_, call),) = read_calls(Folder.opened(str(small)))
    assert call.tensors["cache_seqlens"].tolist() == [301]


def test_what_the_subject_does_not_offer_is_unsupported(recorded: Path) -> None:
    subject = kernel_file(
        recorded.parent, "class Kernel:\n    def merge(self, outs, lses):\n        return outs, lses\n"
    )
    code, records = replayed(recorded, subject)
    assert records[1] == ("replayed call", "unsupported", "Kernel does not offer decode")
    assert code == 1


WIDE: dict[str, Any] = {"dtype": "float32", "num_heads": 4}
OPERATED = {
    **{name: CASES[name] for name in CASES if "," not in name},
    "decode, sinks": CASES["decode, sinks and a window"],
    "prefill, sinks": PrefillCase(
        **WIDE, qk_head_dim=6, v_head_dim=4, seqlens_q=(3, 2), seqlens_k=(9, 4), sink="finite", window=4
    ),
    "prefill": PrefillCase(**WIDE, qk_head_dim=6, v_head_dim=4, seqlens_q=(5, 0, 3), seqlens_k=(9, 4, 3)),
    "merge": MergeCase(**WIDE, head_dim_v=4, s=2, parts=9),
}


@pytest.mark.parametrize("name", OPERATED)
def test_smaller_calls_are_calls_that_an_honest_kernel_passes(name: str) -> None:
    operation = OPERATIONS[name.partition(",")[0]]
    assert isinstance(operation, Operation)
    call, drawn, honest = whole_call(operation, OPERATED[name]), random.Random(0), TorchAbsorbed()
    declared = Declared("honest", (operation.name,), Supports(), honest.profile)
    deep = 0
    while found := list(smaller(call, Supports())):
        for each in found:
            judgement = judge_answer(declared, each, lambda each=each: read_answer(answer_by(honest, each), "answer"))  # type: ignore[misc]
            assert judgement.verdict == "pass", (judgement.message, each)
        call, deep = drawn.choice(found), deep + 1
        assert deep < 200
    assert deep > 3
    assert {x.shape[0] for x in call.tensors.values() if x.ndim > 1} <= {0, 1}


def test_the_smallest_call_has_what_fails_and_nothing_else() -> None:
    operation = OPERATIONS["decode"]
    assert isinstance(operation, Operation)
    call = whole_call(operation, CASES["decode"])
    row = call.tensors["q"][2, 1, 4]

    def fails(each: Call) -> bool:
        q = each.tensors["q"]
        return bool((q[..., 0] == row[0]).any()) and int(each.tensors["cache_seqlens"].max()) >= 6

    found = smallest(call, Supports(), fails, lambda: True)
    assert found.tensors["q"].shape == (1, 1, 1, 1)
    assert found.tensors["cache_seqlens"].tolist() == [6]
    assert smallest(call, Supports(), fails, lambda: False) is call
    kept = smallest(call, Supports(num_heads=(6,), latent_dims=((5, 2),)), fails, lambda: True)
    assert kept.tensors["q"].shape == (1, 1, 6, 7)


def dumped(folder: Path, number: int, function: str, said: dict[str, Any], suffix: str, owner: int | None = 7) -> None:
    """One call as the flight recorder lays it down."""
    each = folder / f"20280101_000000_{number:03}_pid1_{function}_call{number:04}"
    each.mkdir(parents=True)
    tensors = {name: x for name, x in said.items() if isinstance(x, Tensor)}
    for what in ("inputs", "outputs"):
        part = {k: x.contiguous() for k, x in tensors.items() if k.startswith("result") == (what == "outputs")}
        if part and suffix == ".pt":
            torch.save(part, each / f"{what}.pt")
        elif part:
            safetensors.torch.save_file(part, each / f"{what}.safetensors")
    plain = {k: v for k, v in said.items() if k not in tensors and k not in ("signature", "status")}
    begun = {"function_name": function, "process_id": 1, "self_id": owner, "input_metadata": plain}
    begun |= {"function_signature": said["signature"], "execution_status": "inputs_saved"}
    ended = {**begun, "execution_status": said.get("status", "completed")}
    (each / "metadata.jsonl").write_text(f"{json.dumps(begun)}\n{json.dumps(ended)}\n", encoding="utf-8")


PLAN = "(self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_indices, kv_len_arr, num_heads: int, *, causal, sm_scale)"
RUN = "(self, q_nope: Optional[torch.Tensor] = None, q_pe=None, ckv_cache=None, kpe_cache=None, out: Tuple[int, int] = (1, 2))"


def flashinfer(folder: Path, suffix: str, base_e: bool = False, wrong: float = 1.0) -> None:
    """A plan and a run of a decode and a chunk of a prompt, whose pages lie anywhere."""
    drawn = torch.Generator().manual_seed(0)
    q, cache = (torch.randn(*shape, 24, generator=drawn).bfloat16() for shape in ((3, 4), (9, 4)))
    indptr, pages = torch.tensor([0, 3, 5]).int(), torch.randperm(9, generator=drawn)[:5].int()
    lengths, starts = torch.tensor([9, 6]).int(), torch.tensor([0, 1, 3]).int()
    table = torch.stack([pages[:3], torch.cat([pages[3:], pages[:1]])])
    options = {"head_dim_v": 16, "softmax_scale": 0.2, "causal": True}
    out, lse = TorchAbsorbed().ragged_decode(q, cache[:, :, None], table, lengths, starts, **options)
    planned = {f"arg_{i}": x for i, x in enumerate((starts, indptr, pages, lengths), 1)}
    wrapper = "BatchMLAPagedAttentionWrapper"
    plan = {"arg_0": {"type": wrapper}, "arg_5": 4, "kwarg_causal": True, "kwarg_sm_scale": 0.2, "signature": PLAN}
    dumped(folder, 1, f"{wrapper}.plan", {**planned, **plan}, suffix)
    parts = (q[..., :16], q[..., 16:], cache[..., :16], cache[..., 16:])
    run = {f"arg_{i}": x for i, x in enumerate(parts, 1)} | {"kwarg_return_lse": True, "signature": RUN}
    run |= {"kwarg_return_lse_base_on_e": True} if base_e else {}
    run |= {"result_0": out, "result_1": wrong * lse.T / (1.0 if base_e else math.log(2))}
    dumped(folder, 2, f"{wrapper}.run", run, suffix)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("base_e", [False, True])
def test_dumps_of_flashinfer_are_read(suffix: str, base_e: bool, tmp_path: Path) -> None:
    flashinfer(tmp_path / "dumps", suffix, base_e)
    code, records = replayed(tmp_path / "dumps", "torch-absorbed")
    assert code == 0
    assert [verdict for _, verdict, _ in records] == ["pass", "pass"]


def test_a_wrong_output_in_a_dump_is_found(tmp_path: Path) -> None:
    flashinfer(tmp_path / "dumps", ".pt", wrong=1.01)
    code, records = replayed(tmp_path / "dumps", "torch-absorbed")
    assert code == 1
    assert [verdict for _, verdict, _ in records] == ["fail", "pass"]
    assert records[0][2].startswith("lse[")


def test_the_decode_of_tensorrt_is_read_and_what_it_has_beyond_is_told(tmp_path: Path) -> None:
    places, options = arguments()
    q, cache, table, lengths = places
    out, _ = TorchAbsorbed().decode(*places, **options)
    function = "trtllm_batch_decode_with_kv_cache_mla"
    given = {"arg_0": q, "arg_1": cache.transpose(1, 2), "kwarg_block_tables": table, "kwarg_seq_lens": lengths}
    given |= {
        "kwarg_kv_lora_rank": 64,
        "kwarg_bmm1_scale": torch.tensor([options["softmax_scale"]], dtype=torch.float64),
    }
    given |= {"signature": "(query, kv_cache, workspace_buffer, qk_nope_head_dim: int, kv_lora_rank: int)"}
    dumped(tmp_path / "dumps", 1, function, {**given, "result": out}, ".pt", None)
    dumped(tmp_path / "dumps", 2, function, {**given, "kwarg_sinks": {"type": "list"}}, ".pt", None)
    dumped(tmp_path / "dumps", 3, function, {**given, "status": "inputs_saved"}, ".pt", None)
    dumped(tmp_path / "dumps", 4, "rmsnorm", {"signature": "(x)"}, ".pt", None)
    code, records = replayed(tmp_path / "dumps", "torch-absorbed")
    assert code == 0
    assert [(law, verdict) for law, verdict, _ in records] == [
        ("recorded call", "pass"),
        ("replayed call", "pass"),
        ("recorded call", "unsupported"),
        ("replayed call", "pass"),
    ]
    assert records[2][2] == "it was called with sinks, which decode does not have"


def test_dumps_that_cannot_be_read_are_told_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    flashinfer(folder, ".pt")
    plan, run = sorted(folder.iterdir())
    (plan / "inputs.pt").write_bytes(b"PK\x03\x04 nothing")
    (folder / "broken").mkdir()
    (folder / "broken" / "metadata.jsonl").write_text("[1]\n", encoding="utf-8")
    code, records = replayed(folder, "torch-absorbed")
    assert code == 3
    assert [verdict for _, verdict, _ in records] == ["unsupported"] * 3
    assert "is nothing that torch.load reads" in records[0][2]
    assert records[1][2].startswith("the plan of its wrapper was not dumped")
    assert records[2][2] == "the last line of its metadata.jsonl is no object"
    shutil.rmtree(folder)
    flashinfer(folder, ".safetensors")
    path = plan / "inputs.safetensors"
    found = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**found, "arg_2": torch.tensor([0, 3, 2**30]).int()}, path)
    assert replayed(folder, "torch-absorbed")[1][0][2] == "kv_indptr does not divide the 5 entries of kv_indices"
    safetensors.torch.save_file({**found, "arg_4": torch.zeros(2, 2).int()}, path)
    assert replayed(folder, "torch-absorbed")[0] == 3
    assert replayed(run, "torch-absorbed")[0] == 3


def test_parameters_are_read_from_the_text_of_a_signature() -> None:
    assert parameters("(self, a: Tuple[int, str] = (1, ','), b=None, /, c: int = 3, *, d) -> Tuple[int]") == [
        *("self", "a", "b", "c")
    ]
    assert parameters("(query, *args, **kwargs)") == ["query"]
    assert parameters("()") == parameters("") == parameters("<unavailable>") == []


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")


def named(folder: Path, *, base: float = 2, wrong: float = 1.0) -> str:
    """Files as the page describes them, and the file of names that stands there."""
    folder.mkdir()
    (names,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    (folder.parent / "names.toml").write_text(names, encoding="utf-8")
    (q, cache, tables, lengths), options = arguments()
    out, lse = TorchAbsorbed().decode(q, cache, tables, lengths, **options | {"softmax_scale": 0.117851})
    held = {"query": q, "cache": cache[:, :, 0], "tables": tables, "lengths": lengths}
    torch.save({**held, "attention": [out, wrong * lse / math.log(base)], "step": 3}, folder / "step-1.pt")
    torch.save({"other": 1}, folder / "weights.pt")
    return str(folder.parent / "names.toml")


@pytest.mark.parametrize(("wrong", "code"), [(1.0, 0), (1.01, 1)])
def test_plain_files_are_read_by_names(wrong: float, code: int, tmp_path: Path) -> None:
    names = named(tmp_path / "dumps", wrong=wrong)
    found, records = replayed(tmp_path / "dumps", "torch-absorbed", "--map", names)
    assert (found, [verdict for _, verdict, _ in records]) == (code, ["fail" if code else "pass", "pass"])


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it-ran"),)

    names = named(tmp_path / "dumps")
    torch.save(Runs(), tmp_path / "dumps" / "step-2.pt")
    code, records = replayed(tmp_path / "dumps", "torch-absorbed", "--map", names)
    assert not (tmp_path / "it-ran").exists()
    assert [verdict for _, verdict, _ in records] == ["pass", "pass", "unsupported"]
    assert code == 0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            'operation = "decode"',
            'operation = "layer"',
            "the operation is 'layer', which takes no tensors or is unknown",
        ),
        ('q = "query"', 'queries = "query"', "tensors has 'queries'; decode has q, kv_cache"),
        ('q = "query"', "q = 3", "q is 3; expected the name of a tensor in the files"),
        ("causal = true", "causal = ", "Invalid value"),
        ('files = "step-*.pt"', 'files = "none-*.pt"', "holds no file none-*.pt"),
        ("lse_base = 2 ", "lse_base = 10", "lse_base is 10"),
    ],
)
def test_what_is_wrong_with_names_is_said(
    old: str, new: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = Path(named(tmp_path / "dumps"))
    text = names.read_text(encoding="utf-8")
    assert text.count(old) == 1
    names.write_text(text.replace(old, new), encoding="utf-8")
    assert main(["replay", str(tmp_path / "dumps"), "torch-absorbed", "--map", str(names)]) == 2
    assert says in capsys.readouterr().err


def test_a_missing_tensor_or_value_is_told_of_its_file(tmp_path: Path) -> None:
    names = Path(named(tmp_path / "dumps"))
    text = names.read_text(encoding="utf-8")
    names.write_text(text.replace("causal = true", ""), encoding="utf-8")
    assert "decode has no causal" in replayed(tmp_path / "dumps", "torch-absorbed", "--map", str(names))[1][0][2]
    names.write_text(text.replace('"query"', '"nowhere"'), encoding="utf-8")
    message = replayed(tmp_path / "dumps", "torch-absorbed", "--map", str(names))[1][0][2]
    assert message.startswith("step-1.pt has no tensor 'nowhere'; it has 'query', 'cache'")


def test_what_is_no_folder_of_calls_is_said(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(recorded.parent), "torch-absorbed"]) == 2
    assert "holds no recorded calls; expected calls.jsonl" in capsys.readouterr().err
    assert main(["replay", str(recorded), "torch-absorbed", "--into", str(recorded)]) == 2
    assert "holds calls already; expected a new folder" in capsys.readouterr().err
    assert main(["replay", str(recorded), "nothing.py:Kernel"]) == 2


def test_the_time_of_making_smaller_is_bounded(recorded: Path) -> None:
    subject = kernel_file(recorded.parent, LOSES_PAGE)
    start = time.monotonic()
    assert replayed(recorded, subject, "--minimise-seconds", "0.001")[0] == 1
    assert time.monotonic() - start < 60


def test_a_fault_of_where_a_page_lies_is_made_smaller_too() -> None:
    operation = OPERATIONS["decode"]
    assert isinstance(operation, Operation)
    call = whole_call(operation, CASES["decode"])
    far = int(call.tensors["block_table"][2, 0])
    assert far > 0
    found = smallest(
        call, Supports(), lambda each: bool((each.tensors["block_table"][:, 0] == far).any()), lambda: True
    )
    assert found.tensors["q"].shape == (1, 1, 1, 1)
    assert found.tensors["cache_seqlens"].tolist() == [1]
    assert found.tensors["block_table"].tolist() == [[far]]
