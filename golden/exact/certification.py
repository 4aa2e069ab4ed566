"""The float64 reference certified on the kinds of case that subjects are judged on, drawn from a seed.

Inputs are those of ``mla_spec.operations.all``; ``mla_spec.golden.exact.certify`` encloses the exact results in ball arithmetic.
Importing this module needs python-flint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

from mla_spec.golden.exact.certify import LIMIT_ULPS, Certified, certify
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.layer import LayerCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.operations.rope import YARN, RopeCase
from mla_spec.reference.cache import gather_rows
from mla_spec.text.table import format_table

DTYPES = ("float64", "float32", "bfloat16", "float16")

POSITIONS = (0, 1, 63, 4095, 4096, 65537, 163839, 2**20 - 8)
C = TypeVar("C", DecodeCase, PrefillCase)

LOGIT_STDS = (1e-2, 1.0, 4.0, 64.0, 1e3, 1e4, 1e5, 1e8, 1e12)
REGIMES = ("typical", "outlier", "ties", "offset", "sink")


@dataclass(frozen=True)
class Task:
    """One case: what ``certify`` takes, and a text that names it."""

    text: str
    operation: str
    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """All results of one operation: how many cases and numbers, and the worst of them in ulps of its gauge."""

    operation: str
    cases: int
    elements: int
    ulps: float
    worst: str

    @property
    def certified(self) -> bool:
        """Whether every element is within ``LIMIT_ULPS``."""
        return bool(self.ulps <= LIMIT_ULPS)


def certification(count: int, seed: int = 0, *, progress: Callable[[str], object] = lambda text: None) -> list[Summary]:
    """Certify ``count`` cases, of each kind in turn; ``progress`` is told the case at hand, and "" at the end."""
    summaries: dict[str, Summary] = {}
    for number, task in enumerate(tasks(count, seed)):
        progress(f"[{number + 1}/{count}] {task.operation}")
        results = certify(task.operation, task.inputs, task.parameters)
        summaries[task.operation] = _with(summaries.get(task.operation), task, results)
    progress("")
    return list(summaries.values())


def _with(before: Summary | None, task: Task, results: list[Certified]) -> Summary:
    """The summary ``before`` with the results of one more case."""
    worst = max(results, key=lambda result: result.ulps)
    after = Summary(
        operation=task.operation,
        cases=1,
        elements=sum(result.elements for result in results),
        ulps=worst.ulps,
        worst=f"{worst.name}{list(worst.index)} of {task.text}",
    )
    if before is None:
        return after
    further = after if after.ulps > before.ulps else before
    return replace(further, cases=before.cases + 1, elements=before.elements + after.elements)


def report(summaries: list[Summary]) -> str:
    """A table of the operations, and a sentence that says whether the reference is certified."""
    header = ("operation", "cases", "numbers", "worst, in ulps of the gauge", "where")
    rows = [(s.operation, str(s.cases), str(s.elements), f"{s.ulps:.3f}", s.worst) for s in summaries]
    cases, elements = (sum(getattr(s, name) for s in summaries) for name in ("cases", "elements"))
    worst = max(s.ulps for s in summaries)
    says = "is within" if worst <= LIMIT_ULPS else "exceeds"
    last = f"{cases} cases, {elements} numbers: the float64 reference {says} {LIMIT_ULPS:g} ulps, at most {worst:.3f}"
    return f"{format_table([header, *rows])}\n\n{last}"


def tasks(count: int, seed: int) -> Iterator[Task]:
    """The cases, the same for the same seed."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        yield _KINDS[number % len(_KINDS)](rng, number)


def _one(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def _rope_case(rng: np.random.Generator, number: int) -> RopeCase:
    return RopeCase(
        dtype=_one(rng, *DTYPES),
        seed=number,
        batch=2,
        s=3,
        heads=_one(rng, 0, 2),
        dim=_one(rng, 2, 6, 16, 64),
        layout=_one(rng, "interleaved", "half"),
        theta=_one(rng, 500.0, 10000.0, 50000.0, 8e6),
        yarn=_one(rng, *YARN),
        start=_one(rng, *POSITIONS),
    )


def _rope(rng: np.random.Generator, number: int) -> Task:
    case = _rope_case(rng, number)
    inputs = {"x": case.vectors(1)[0], "positions": case.positions()}
    return Task(case.id, "rope", inputs, {"rope": asdict(case.rope)})


def _rope_table(rng: np.random.Generator, number: int) -> Task:
    case = _rope_case(rng, number)
    return Task(case.id, "rope_table", {"positions": case.positions()}, {"rope": asdict(case.rope)})


def _decode_case(rng: np.random.Generator, number: int, *, real: bool) -> DecodeCase:
    """Small dims and ragged batches, or DeepSeek-V3's 512/64 and 128/64/128 with few heads and keys."""
    c, r = (512, 64) if real else _one(rng, (1, 0), (5, 2), (16, 8), (24, 12))
    lengths = rng.integers(1, 9, 2) if real else rng.integers(0, 40, 3)
    return DecodeCase(
        dtype=_one(rng, *DTYPES),
        seed=number,
        seqlens=tuple(int(n) for n in lengths),
        s=_one(rng, 1, 2, 3),
        num_heads=_one(rng, 1, 2),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=_one(rng, 1, 3, 16),
        causal=_one(rng, True, False),
        logit_std=_one(rng, *LOGIT_STDS),
        regime=_one(rng, *REGIMES),
        qk_nope_head_dim=128 if real else 4,
        v_head_dim=128 if real else 3,
    )


def _with_options(rng: np.random.Generator, case: C) -> C:
    """The case, in half of the draws with a sink, in half with a window."""
    return replace(case, sink=_one(rng, "none", "none", "finite", "infinite"), window=_one(rng, 0, 0, 1, 5))


def _decode(rng: np.random.Generator, number: int, *, real: bool = False) -> Task:
    case = _with_options(rng, _decode_case(rng, number, real=real))
    arguments = asdict(case.build())
    parameters = {name: arguments.pop(name) for name in ("head_dim_v", "softmax_scale", "causal", "window")}
    return Task(case.id, "decode", arguments, parameters)


def _real_decode(rng: np.random.Generator, number: int) -> Task:
    return _decode(rng, number, real=True)


def _absorption(rng: np.random.Generator, number: int, *, real: bool = False) -> Task:
    """Both forms of attention over one sequence's latents."""
    case = _decode_case(rng, number, real=real)
    built, (kv_b_proj, config, q_nope) = case.build(), case.latent_weights()
    c, length = case.kv_lora_rank, max(1, min(case.seqlens[-1], 4 if real else 12))
    rows = gather_rows(built.kv_cache, built.block_table[-1:], np.array([case.seqlens[-1]]))[:, :length]
    if rows.shape[1] == 0:
        rows = built.kv_cache[:1, :1, 0]
    inputs = {
        "q_nope": q_nope[-1:],
        "q_pe": built.q[-1:, ..., c:],
        "latent": rows[..., :c],
        "k_pe": rows[..., c:],
        "kv_b_proj": kv_b_proj,
    }
    return Task(case.id, "absorption", inputs, {"softmax_scale": built.softmax_scale, "config": asdict(config)})


def _real_absorption(rng: np.random.Generator, number: int) -> Task:
    return _absorption(rng, number, real=True)


def _absorb(rng: np.random.Generator, number: int) -> Task:
    case = _decode_case(rng, number, real=False)
    kv_b_proj, config, _ = case.latent_weights()
    return Task(case.id, "absorb", {"kv_b_proj": kv_b_proj}, {"config": asdict(config)})


def _layer(rng: np.random.Generator, number: int, **dims: int) -> Task:
    """Layers with the options of published models: factors, norms, gates, sinks."""
    case = LayerCase(
        dtype=_one(rng, *DTYPES),
        seed=number,
        batch=1 if dims else 2,
        prompt=2 if dims else 4,
        steps=1 if dims else 2,
        hidden_size=12,
        num_heads=1 if dims else 2,
        q_lora_rank=_one(rng, None, 7),
        kv_lora_rank=dims.get("kv_lora_rank", 10),
        qk_nope_head_dim=dims.get("qk_nope_head_dim", 5),
        qk_rope_head_dim=dims.get("qk_rope_head_dim", 4),
        v_head_dim=dims.get("v_head_dim", 6),
        layout=_one(rng, "interleaved", "half", "none"),
        theta=_one(rng, 100.0, 10000.0),
        yarn=_one(rng, *YARN),
        start=_one(rng, *POSITIONS),
        latent_norm_eps=_one(rng, 1e-6, 1e-5),
        weights=_one(rng, "dense", "aligned"),
        gain=_one(rng, 0.125, 1.0, 64.0),
        hidden_scale=_one(rng, 1.0, 2.0**-10),
        output_gate=_one(rng, "none", "head", "element"),
        attention_sink=_one(rng, False, True),
        mla_scale_kv_lora=_one(rng, False, True),
        llama_4_scaling=_one(rng, False, True),
        k_pe_norm=_one(rng, False, True),
    )
    if case.q_lora_rank is not None:
        case = replace(case, **_one(rng, {}, {"mla_scale_q_lora": True}, {"output_gate": "query"}))
    built = case.build()
    weights = {f"weights.{name}": values for name, values in built.weights.items()}
    inputs = {**weights, "hidden": built.hidden, "positions": built.positions}
    return Task(case.id, "layer", inputs, {"config": asdict(built.config), "prompt": case.prompt})


def _real_layer(rng: np.random.Generator, number: int) -> Task:
    return _layer(rng, number, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def _prefill(rng: np.random.Generator, number: int) -> Task:
    """Ragged sequences of multi-head attention, queries longer and shorter than keys."""
    h, d, v = _one(rng, (1, 6, 4), (2, 12, 8), (1, 192, 128))
    case = PrefillCase(
        dtype=_one(rng, *DTYPES),
        seed=number,
        seqlens_q=tuple(int(n) for n in rng.integers(0, 6, 3)),
        seqlens_k=tuple(int(n) for n in rng.integers(0, 6, 3)),
        num_heads=h,
        qk_head_dim=d,
        v_head_dim=v,
        causal=_one(rng, True, False),
        logit_std=_one(rng, *LOGIT_STDS),
        regime=_one(rng, "typical", "outlier", "ties"),
    )
    case = _with_options(rng, case)
    arguments = asdict(case.build())
    parameters = {name: arguments.pop(name) for name in ("softmax_scale", "causal", "window")}
    return Task(case.id, "prefill", arguments, parameters)


def _merge(rng: np.random.Generator, number: int) -> Task:
    """Up to five parts, some without keys, of near or of very different mass."""
    case = MergeCase(
        dtype=_one(rng, *DTYPES),
        seed=number,
        parts=_one(rng, 1, 2, 5),
        batch=2,
        s=2,
        num_heads=3,
        head_dim_v=4,
        lse_mean=_one(rng, 0.0, 0.0, -1e4, 1e4),
        lse_std=_one(rng, 0.01, 1.0, 30.0, 1e4),
        empty=_one(rng, 0.0, 0.3),
    )
    return Task(case.id, "merge", asdict(case.build()), {})


def _rms_norm(rng: np.random.Generator, number: int) -> Task:
    width, size = _one(rng, 1, 8, 512), _one(rng, 1e-5, 1e-3, 1.0, 1e3)
    inputs = {"x": size * rng.standard_normal((3, width)), "weight": rng.uniform(0.5, 1.5, width)}
    return Task(f"rms_norm number {number}, {width} wide, of {size:g}", "rms_norm", inputs, {"eps": 1e-6})


def _project_indexer(rng: np.random.Generator, number: int) -> Task:
    d = _one(rng, 8, 16, 128)
    case = ProjectIndexerCase(
        dtype=_one(rng, *DTYPES),
        seed=number,
        seqlens=(3, 2),
        hidden_size=_one(rng, 3, 12, 100),
        q_lora_rank=_one(rng, 2, 7, 64),
        index_n_heads=2,
        index_head_dim=d,
        rope_dim=_one(rng, 0, d // 2, d),
        layout=_one(rng, "interleaved", "half"),
        theta=_one(rng, 100.0, 10000.0),
        yarn=_one(rng, *YARN),
        start=_one(rng, *POSITIONS),
        hidden_scale=_one(rng, 1.0, 2.0**-10),
    )
    built = case.build()
    weights = {f"weights.{name}": values for name, values in built.weights.items()}
    inputs = {**weights, "hidden": built.hidden, "q_latent": built.q_latent, "positions": built.positions}
    return Task(case.id, "project_indexer", inputs, {"config": asdict(built.config)})


_KINDS = (
    _decode,
    _rope,
    _layer,
    _real_decode,
    _rope_table,
    _absorption,
    _merge,
    _prefill,
    _real_absorption,
    _rms_norm,
    _real_layer,
    _absorb,
    _project_indexer,
)
