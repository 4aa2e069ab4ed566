"""The subjects around PyTorch's kernels conform where a CPU has the kernel, so that a GPU tests nothing but the kernel."""

from __future__ import annotations

import pytest
from torch_kernels import Flex, SDPAFlash, SDPAMath

from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law

LAWS = (
    "test_decode_agrees_with_reference",
    "test_prefill_agrees_with_reference",
    "test_prefill_in_chunks_of_queries",
    "test_prefill_calls_are_independent",
)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("subject", "dtype"), [(SDPAMath, "float32"), (SDPAFlash, "float16"), (Flex, "float32")])
def test_adapter_conforms(subject: type, dtype: str, law: str) -> None:
    record = run_law(all_laws()[law], subject(), Options(examples=12, dtypes=(dtype,)))
    assert record.verdict == "pass", record.text()


def test_aligned_to_the_top_left_is_a_violation() -> None:
    class TopLeft(SDPAMath):
        """As ``is_causal=True`` is when there are more keys than queries."""

        def attend(self, q, k, v, softmax_scale, causal):  # type: ignore[no-untyped-def]
            return self.kernel(q, k, v, softmax_scale, causal) if k.shape[2] else super().attend(q, k, v, 1.0, False)

    record = run_law(
        all_laws()["test_prefill_agrees_with_reference"], TopLeft(), Options(examples=40, dtypes=("float32",))
    )
    assert record.verdict == "fail"
