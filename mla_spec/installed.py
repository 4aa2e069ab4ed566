"""What stands above the rooms that need it, loaded by name. No other file loads by name what lies above it.

The laws, the golden files and the planted bugs are packages of their own: they import the rooms below them, and never the
other way round. A room below that runs them asks here.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_spec.judging.law import Law

SHIPPED = {
    "torch-explicit": "mla_spec.adapters.pytorch:TorchExplicit",
    "torch-absorbed": "mla_spec.adapters.pytorch:TorchAbsorbed",
    "torch-sdpa": "mla_spec.adapters.pytorch:TorchSDPA",
    "transformers:deepseek_v2": "mla_spec.adapters.transformers:DeepseekV2",
    "transformers:deepseek_v3": "mla_spec.adapters.transformers:DeepseekV3",
    "transformers:deepseek_v2-eager": "mla_spec.adapters.transformers:DeepseekV2Eager",
    "transformers:deepseek_v3-eager": "mla_spec.adapters.transformers:DeepseekV3Eager",
    "transformers:glm4_moe_lite": "mla_spec.adapters.transformers_layers:Glm4MoeLite",
    "transformers:youtu": "mla_spec.adapters.transformers_layers:Youtu",
    "transformers:axk1": "mla_spec.adapters.transformers_layers:AXK1",
    "transformers:minicpm3": "mla_spec.adapters.transformers_layers:MiniCPM3",
    "transformers:longcat_flash": "mla_spec.adapters.transformers_layers:LongcatFlash",
    "transformers:mistral4": "mla_spec.adapters.transformers_layers:Mistral4",
    "transformers:kimi_linear": "mla_spec.adapters.transformers_layers:KimiLinear",
    "transformers:deepseek_v32": "mla_spec.adapters.transformers_dsa:DeepseekV32",
    "transformers:glm_moe_dsa": "mla_spec.adapters.transformers_dsa:GlmMoeDsa",
    "torchtitan": "mla_spec.adapters.torchtitan:Torchtitan",
    "vllm-cpu": "mla_spec.adapters.vllm_cpu:VllmCpu",
    "vllm-triton": "mla_spec.adapters.vllm_triton:VllmTriton",
    "vllm-triton-one-head": "mla_spec.adapters.vllm_triton:VllmTritonOneHead",
    "sglang-triton": "mla_spec.adapters.sglang_triton:SglangTriton",
    "sglang-triton-extend": "mla_spec.adapters.sglang_triton:SglangTritonExtend",
}
"""Subjects that ship, by the name a user gives. A class may have ``unavailable()``: why it cannot run here, or ""."""

FROM_FILES = {
    "deepseek": "mla_spec.adapters.deepseek:absorbed",
    "deepseek-naive": "mla_spec.adapters.deepseek:naive",
}
"""By the word before the colon, what makes a subject of a user's file, such as deepseek:path/to/model.py."""

LAW_MODULES = (
    "test_rope",
    "test_rope_gradients",
    "test_absorb",
    "test_weights",
    "test_decode",
    "test_decode_exact",
    "test_decode_memory",
    "test_decode_tables",
    "test_page_numbers",
    "test_ragged",
    "test_rank_decode",
    "test_statistics",
    "test_prefill",
    "test_window_and_sink",
    "test_backward",
    "test_merge",
    "test_merge_gradients",
    "test_write_cache",
    "test_sparse",
    "test_project_indexer",
    "test_indexer",
    "test_indexed_attention",
    "test_quantised_cache",
    "test_quantised_decode",
    "test_layer",
    "test_layer_weights",
    "test_golden",
    "test_layer_gradients",
    "test_tensor_parallel",
    "test_context_parallel",
    "test_production",
    "test_exact_at_length",
    "test_light_keys",
    "test_load",
    "test_hazards",
    "test_cuda_graph",
    "test_compiled",
)
"""Modules of ``mla_spec.properties`` that hold laws, in the order of the report."""


HOLD_SUBJECTS = ("mla_spec.adapters", "mla_spec.planted_bugs", "mla_spec.proof", "mla_spec.exchange")
"""Packages that hold subjects, or call what somebody else wrote."""


def operation_names() -> tuple[str, ...]:
    """The operations that a subject may offer, in the order of reports."""
    return tuple(import_module("mla_spec.operations.all").OPERATIONS)


def operation_named(name: str) -> Any:
    """The operation that is called so, or None."""
    return import_module("mla_spec.operations.all").OPERATIONS.get(name)


def subject_elsewhere(spec: str) -> Any:
    """The subject that answers through a pipe or by files; see ``mla_spec.exchange.named``."""
    return import_module("mla_spec.exchange.named").subject_elsewhere(spec)


def kernel_signatures() -> Any:
    """The module that makes adapters of kernels with public signatures."""
    return import_module("mla_spec.adapters.written")


def law_modules() -> list[str]:
    """The modules that hold laws, by their whole names."""
    return [f"mla_spec.properties.{name}" for name in LAW_MODULES]


@functools.cache
def all_laws() -> dict[str, Law]:
    """Every law by name, in the order of the report."""
    laws: dict[str, Law] = {}
    for name in law_modules():
        for value in vars(import_module(name)).values():
            if hasattr(value, "law"):
                laws[value.law.name] = value.law
    return laws


@functools.cache
def quick_laws() -> dict[str, Any]:
    """By the name of a law that is part of a quick check, what gives the cases that it begins with."""
    return dict(import_module("mla_spec.properties.quick").QUICK)


def load_for_subjects() -> None:
    """Import what the process of every subject needs, so that copies of this one need not."""
    for name in ("torch", "mla_spec.operations.all", "mla_spec.subjects.process"):
        import_module(name)


def planted_bugs() -> dict[str, Any]:
    """Every planted bug by its id."""
    return dict(import_module("mla_spec.planted_bugs").PLANTED)


def reported_faults() -> list[Any]:
    """The faults that were reported in public, planted or not."""
    return list(import_module("mla_spec.planted_bugs.catalogue").catalogue())


def golden_corpus() -> Any:
    """The module that verifies and regenerates the golden files."""
    return import_module("mla_spec.golden.corpus.corpus")


def golden_laws() -> Any:
    """The module that holds subjects against the golden files."""
    return import_module("mla_spec.golden.corpus.laws")


def certification() -> Any:
    """The module that certifies the reference in ball arithmetic.

    Raises:
        ModuleNotFoundError: python-flint is not installed.
    """
    return import_module("mla_spec.golden.exact.certification")
