"""Golden cases as laws: a subject computes what a case asks for, and is judged by its frozen answer.

The answer is the corpus's, and how far the subject may be from it follows from the subject's profile. A case runs in each
dtype of the subject that holds its inputs exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.golden.cases.case import config_from, layer_weights
from mla_spec.golden.corpus.calls import CALLS, dtypes_of
from mla_spec.golden.corpus.corpus import StoredCase, load
from mla_spec.judging.law import Law, Options, Run
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.operations import layer
from mla_spec.operations.all import OPERATIONS
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Exactly, Within
from mla_spec.reference.formats import FORMATS, round_to
from mla_spec.reference.typing import Array
from mla_spec.subjects.description import declared_by
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports


@dataclass(frozen=True, kw_only=True)
class GoldenCase(Case):
    """A case of the corpus, by its name."""

    kind = "golden"
    name: str = ""


def _judge_call(case: StoredCase, run: Run, _: Case) -> None:
    operation, build = CALLS[case.operation]
    inputs = build(case)
    got = run.call(operation, inputs)
    for output, part, want in zip(
        operation.outputs, got, operation.expected(inputs, run.profile, run.supports), strict=True
    ):
        if part is not None and want is not None:
            answer = case.expected.get(output.name)
            if isinstance(want, Within) and want.read is None and answer is not None:
                narrowest = run.profile.dtype if output.kind == "values" else run.profile.lse
                exact = output.name in case.exact and np.array_equal(round_to(answer, narrowest), answer)
                want = Exactly(_declared(want, answer)) if exact else _frozen(want, answer)
            want.judge(run, part)


def _declared(want: Within, answer: Array) -> Array:
    """The answer, with what a subject declares for rows without keys."""
    return np.where(np.isinf(want.value), want.value, answer)


def _frozen(want: Within, answer: Array) -> Within:
    """The corpus's answer in the place of the reference's, with the one rounding that it has."""
    rounding = FORMATS["float64"].unit_roundoff * np.where(np.isinf(answer), 0.0, np.abs(answer))
    return replace(
        want,
        value=_declared(want, answer),
        bound=want.bound.plus("rounding of the golden answer", rounding),
        gate=False,
    )


def _judge_layer(case: StoredCase, run: Run, _: Case) -> None:
    config, weights, prompt = (
        config_from(case.parameters["config"]),
        layer_weights(case.inputs),
        case.parameters["prompt"],
    )
    hidden, positions = case.inputs["hidden"], case.inputs["positions"]
    want, bound = layer_with_bound(hidden, positions, weights, config, run.profile)
    answer = np.concatenate([case.expected[name] for name in ("prefill", "decode") if name in case.expected], axis=1)
    made = there(layer.LayerDriver.of, run.driver, weights, config)
    ends = [prompt, *range(prompt + 1, hidden.shape[1] + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        tokens = slice(start, end)
        got = made.run("decode" if start else "prefill", hidden[:, tokens], positions[:, tokens])
        part = _frozen(Within(want[:, tokens], bound[:, tokens]), answer[:, tokens])
        part.judge(run, got)


def refused(case: StoredCase, supports: Supports) -> str:
    """Why a subject that supports so much cannot be given a case, or ""."""
    x, p = case.inputs, case.parameters
    heads = {name: x[name].shape[-2] for name in ("q", "outs") if name in x and case.operation != "indexer"}
    wanted: list[tuple[str, Any, tuple[Any, ...] | None]] = [
        *(("num_heads", h, supports.num_heads) for h in heads.values()),
        ("causal", p.get("causal"), supports.causal if "causal" in p else None),
        ("page_sizes", x["kv_cache"].shape[1] if "kv_cache" in x else p.get("page_size"), supports.page_sizes),
        ("cache_formats", p.get("layout"), supports.cache_formats if "layout" in p else None),
    ]
    sizes = getattr(OPERATIONS.get(case.operation), "sizes", ())
    if "latent_dims" in sizes and "q" in x:
        c = p["head_dim_v"]
        wanted.append(("latent_dims", (c, x["q"].shape[-1] - c), supports.latent_dims))
    if case.operation == "prefill":
        wanted.append(("prefill_dims", (x["q"].shape[-1], x["v"].shape[-1]), supports.prefill_dims))
    if case.operation == "indexer":
        wanted.append(("indexer_dims", x["q"].shape[1:], supports.indexer_dims))
        wanted.append(("indexer_top_k", p["top_k"], supports.indexer_top_k))
    for field, value, accepted in wanted:
        if value is not None and accepted is not None and value not in accepted:
            return f"does not support {field} {value}"
    sinks = supports.attention_sink if case.operation.startswith("sparse") else case.operation in supports.dense_sink
    if "attn_sink" in x and not sinks:
        return "takes no attn_sink"
    if "window" in p and case.operation not in supports.sliding_window:
        return "takes no window"
    if "topk_length" in x and not supports.topk_length:
        return "takes no topk_length"
    if "indices" in x and x["indices"].shape[-1] % supports.topk_multiple:
        return f"takes multiples of {supports.topk_multiple} indices"
    if case.operation in ("decode", "rank_decode", "decode_quantized") and x["q"].shape[1] > (
        supports.max_s or x["q"].shape[1]
    ):
        return f"takes {supports.max_s} queries per sequence"
    if "outs" in x and len(x["outs"]) > (supports.max_parts or len(x["outs"])):
        return f"merges {supports.max_parts} parts"
    if supports.empty_row == "unsupported" and any(
        np.isneginf(y).any() for y in (*x.values(), *case.expected.values())
    ):
        return "has no rule for rows without keys"
    if p.get("softmax_scale", 1.0) < 0 and not supports.negative_scale:
        return "takes no negative scale"
    return _refused_rope(p, supports)


def _refused_rope(parameters: Mapping[str, Any], supports: Supports) -> str:
    """The same of rotary embeddings and of the options of a layer."""
    config = parameters.get("config") or {}
    rope = parameters.get("rope", config.get("rope"))
    indexes = "index_n_heads" in config
    if rope is None:
        optional = supports.indexer_rope_optional if indexes else supports.rope_optional
        return "" if "config" not in parameters or optional else "has no layer without rotary embedding"
    layouts = supports.indexer_rope_layouts if indexes else supports.rope_layouts
    layout = "interleaved" if rope["interleaved"] else "half"
    if layout not in layouts:
        return f"does not know the {layout} layout"
    yarn = rope["yarn"]
    if yarn is not None and not supports.yarn:
        return "does not know YaRN"
    if yarn is not None and supports.yarn_mscale_rule == "equal" and yarn["mscale"] != yarn["mscale_all_dim"]:
        return "knows YaRN with equal mscale and mscale_all_dim only"
    if rope["longrope"] is not None and not supports.longrope:
        return "does not know LongRoPE"
    return _refused_layer(config, supports)


def _refused_layer(config: Mapping[str, Any], supports: Supports) -> str:
    """The same of the other options of a layer."""
    if config.get("llama_4_scaling") and not supports.llama_4_scaling:
        return "does not know a temperature by position"
    if (config.get("mla_scale_q_lora") or config.get("mla_scale_kv_lora")) and not supports.mla_scale_lora:
        return "does not know factors on latents"
    if config.get("latent_norm_eps") not in (None, supports.latent_norm_eps) and supports.latent_norm_eps is not None:
        return f"has latent_norm_eps {supports.latent_norm_eps} only"
    multiple = supports.layer_dim_multiple
    dims = [config[name] for name in ("kv_lora_rank", "qk_nope_head_dim") if name in config]
    return "" if all(dim % multiple == 0 for dim in dims) else f"wants dims that are multiples of {multiple}"


def golden_laws(directory: str | os.PathLike[str] | None = None) -> dict[str, tuple[Law, StoredCase]]:
    """A law for every case of a corpus that a subject can be asked, by the case's name."""
    laws = {}
    for case in load(directory):
        if case.operation in CALLS:
            needs, check = CALLS[case.operation][0].name, partial(_judge_call, case)
        elif case.operation == "layer":
            needs, check = "layer", partial(_judge_layer, case)
        else:
            continue
        check.__doc__ = case.purpose
        law = Law(f"golden:{case.name}", (needs,), _cases(case.name), check, partial(refused, case))
        laws[case.name] = (law, case)
    return laws


def _cases(name: str) -> Callable[[Any, Any], list[Any]]:
    return lambda supports, profile: [GoldenCase(dtype=profile.dtype, name=name)]


def check_golden(
    subject: object, directory: str | os.PathLike[str] | None = None, options: Options = Options()
) -> list[Record]:
    """One record for every golden case that a subject can be asked; it may be in a process of its own.

    Raises:
        CorpusError: as ``load``.
    """
    records = []
    declared = declared_by(subject)
    for law, case in golden_laws(directory).values():
        dtypes = dtypes_of(case, declared.supports.dtypes)
        if dtypes:
            records.append(run_law(law, subject, replace(options, dtypes=dtypes)))
        else:
            message = "no dtype of the subject holds the inputs of the case"
            records.append(Record(law.name, declared.name, "unsupported", message=message))
    return records


def catches(records: list[Record], directory: str | os.PathLike[str] | None = None) -> Mapping[str, str]:
    """By the name of each law that does not hold, which faults its case catches."""
    laws = {law.name: case for law, case in golden_laws(directory).values()}
    return {r.law: laws[r.law].catches for r in records if r.verdict in ("fail", "crashed")}
