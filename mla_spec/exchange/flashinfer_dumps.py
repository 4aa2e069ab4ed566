"""What FlashInfer's flight recorder writes (``FLASHINFER_LOGLEVEL=10``), as recorded calls.

Each call has a folder of its own: ``metadata.jsonl``, whose last line is the whole truth, and ``inputs`` and ``outputs`` as
``.pt`` or ``.safetensors``. Tensors are called ``arg_0``, ``kwarg_NAME``, ``result`` or ``result_0``; plain values lie in
``input_metadata``. Which parameter ``arg_0`` is, ``function_signature`` says. (flashinfer/api_logging.py, 0.6.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_spec.exchange.call import Call
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.recorded import Recorded
from mla_spec.exchange.tensor_dump import read_dump
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.subjects.violation import SubjectCrashed
from mla_spec.text.files import read_text
from mla_spec.text.terminal import one_line

METADATA = "metadata.jsonl"
WRAPPER, DECODE = "BatchMLAPagedAttentionWrapper", "trtllm_batch_decode_with_kv_cache_mla"

Arguments = dict[str, Any]


class _Unreadable(Exception):
    """Why a dump is no call that can be judged, as a clause."""


def flashinfer_calls(folder: Path) -> Iterator[Recorded]:
    """The MLA calls of a folder of dumps, or of one dump, in the order in which they were made.

    A ``run`` of the wrapper needs the last ``plan`` of the same object. Calls of other functions are passed over.
    """
    plans: dict[tuple[Any, Any], Arguments] = {}
    found = [folder] if (folder / METADATA).exists() else sorted(path.parent for path in folder.glob(f"*/{METADATA}"))
    for each in found:
        try:
            said = _metadata(each)
            name = str(said.get("function_name", ""))
            owner = said.get("process_id"), said.get("self_id")
            if name == f"{WRAPPER}.plan":
                plans[owner] = _arguments(each, said)
            elif name == f"{WRAPPER}.run":
                call = _ragged(plans.get(owner), given := _arguments(each, said))
                yield Recorded(each.name, call, _answer(each, said, partial(_of_run, given)))
            elif name.rpartition(".")[2] == DECODE:
                call = _decode(_arguments(each, said))
                yield Recorded(each.name, call, _answer(each, said, lambda outputs: {"out": outputs[0]}))
        except (_Unreadable, ExchangeError) as error:
            yield Recorded(each.name, str(error))
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:  # whatever was dumped
            yield Recorded(each.name, f"its tensors make no call: {one_line(error, 200)}")


def _metadata(folder: Path) -> dict[str, Any]:
    try:
        lines = [line for line in read_text(folder / METADATA).splitlines() if line.strip()]
        said = json.loads(lines[-1])
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise _Unreadable(f"its {METADATA} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise _Unreadable(f"the last line of its {METADATA} is no object")
    return said


def _arguments(folder: Path, said: Mapping[str, Any]) -> Arguments:
    """The arguments of the call by the names of parameters; those with their default are not dumped."""
    names = parameters(str(said.get("function_signature", "")))
    plain = said.get("input_metadata")
    given = {**(plain if isinstance(plain, dict) else {}), **_tensors(folder, "inputs")}
    found: Arguments = {}
    for key, value in given.items():
        kind, _, rest = key.partition("_")
        if kind == "kwarg":
            found[rest] = value
        elif kind == "arg" and rest.isdigit() and int(rest) < len(names):
            found[names[int(rest)]] = value
    return found


def parameters(signature: str) -> list[str]:
    """The names of positional parameters in the text of a signature."""
    names, depth, word = [], 0, ""
    for letter in signature.strip()[1:]:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0 or (letter == "," and depth == 0):
            names.append(word.partition(":")[0].partition("=")[0].strip())
            word = ""
        else:
            word += letter
        if depth < 0:
            break
    names = [name for name in names if name and name != "/"]
    starred = next((i for i, name in enumerate(names) if name.startswith("*")), len(names))
    return names[:starred]


def _tensors(folder: Path, what: str) -> dict[str, Any]:
    for suffix in (".pt", ".safetensors"):
        if (folder / (what + suffix)).exists():
            return read_dump(folder / (what + suffix))
    return {}


def _answer(
    folder: Path, said: Mapping[str, Any], convert: Callable[[list[Tensor]], Answer]
) -> Callable[[], Answer | None] | None:
    """What gives the outputs; None where the call did not return."""
    if said.get("execution_status") != "completed":
        return None

    def outputs() -> Answer | None:
        try:
            found = _tensors(folder, "outputs")
        except ExchangeError as error:
            raise SubjectCrashed(str(error)) from error
        results = [found[name] for name in ("result", "result_0", "result_1") if name in found]
        return convert(results) if results else None

    return outputs


def _of_run(given: Arguments, outputs: list[Tensor]) -> Answer:
    """Outputs of ``run``: out, and an LSE [tokens, h] of base 2 unless it was asked for otherwise."""
    answer = {"out": outputs[0]}
    if len(outputs) > 1:
        factor = 1.0 if given.get("return_lse_base_on_e") else math.log(2)
        answer["lse"] = outputs[1].double().T * factor  # in float64, so that nothing is rounded to float32 again
    return answer


def _ragged(plan: Arguments | None, given: Arguments) -> Call:
    """``plan`` and ``run`` as ``ragged_decode``."""
    if plan is None:
        raise _Unreadable("the plan of its wrapper was not dumped; FLASHINFER_DUMP_EXCLUDE must not name it")
    if any(isinstance(x, dict) for x in (plan.get("metadata"), given.get("query"), given.get("kv"))):
        raise _Unreadable("its tensors were passed inside objects, which the flight recorder does not dump")
    for name in ("sinks", "bmm1_scale", "bmm2_scale", "ckv_scale", "kpe_scale", "o_scale"):
        if given.get(name) is not None:
            raise _Unreadable(f"it was called with {name}, which ragged_decode does not have")
    q_nope, ckv = _tensor(given, "q_nope"), _tensor(given, "ckv_cache")
    starts, pages = _tensor(plan, "kv_indptr").tolist(), _tensor(plan, "kv_indices")
    counts = [b - a for a, b in pairwise(starts)]
    if min([0, *starts, *counts]) < 0 or max([0, *starts]) > len(pages):
        raise _Unreadable(f"kv_indptr does not divide the {len(pages)} entries of kv_indices")
    table = torch.zeros(len(counts), max([1, *counts]), dtype=torch.int32)
    for row, start, n in zip(table, starts, counts, strict=False):
        row[:n] = pages[start : start + n]
    tensors = {
        "q": torch.cat([q_nope, _tensor(given, "q_pe")], -1),
        "kv_cache": torch.cat([ckv, _tensor(given, "kpe_cache")], -1)[:, :, None],
        "block_table": table,
        "cache_seqlens": _tensor(plan, "kv_len_arr").int(),
        "cu_seqlens_q": _tensor(plan, "qo_indptr").int(),
    }
    values = {
        "head_dim_v": q_nope.shape[-1],
        "softmax_scale": _number(plan, "sm_scale"),
        "causal": bool(plan.get("causal")),
    }
    return Call("ragged_decode", tensors, values)


def _decode(given: Arguments) -> Call:
    """The function of TensorRT-LLM's kernels as ``decode``."""
    for name, without in (("sparse_mla_top_k", 0), ("sinks", None), ("cum_seq_lens_q", None), ("bmm2_scale", 1.0)):
        if name in given and (isinstance(given[name], Tensor) or given[name] != without):
            raise _Unreadable(f"it was called with {name}, which decode does not have")
    q, cache = _tensor(given, "query"), _tensor(given, "kv_cache")
    if cache.ndim == 4:  # [pages, 1, page_size, c+r]
        cache = cache[:, 0]
    if q.ndim != 4 or cache.ndim != 3:
        raise _Unreadable(
            f"its query is {list(q.shape)} and its kv_cache {list(cache.shape)}, which decode does not take"
        )
    tensors = {
        "q": q,
        "kv_cache": cache[:, :, None],
        "block_table": _tensor(given, "block_tables").int(),
        "cache_seqlens": _tensor(given, "seq_lens").int(),
    }
    values = {
        "head_dim_v": int(_number(given, "kv_lora_rank")),
        "softmax_scale": _number(given, "bmm1_scale"),
        "causal": True,
    }
    return Call("decode", tensors, values)


def _tensor(given: Arguments, name: str) -> Tensor:
    found = given.get(name)
    if not isinstance(found, Tensor):
        raise _Unreadable(f"{name} was not dumped as a tensor")
    return found


def _number(given: Arguments, name: str) -> float:
    found = given.get(name)
    if isinstance(found, Tensor) and found.numel() == 1:
        return float(found)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _Unreadable(f"{name} was not dumped as a number")
    return found
