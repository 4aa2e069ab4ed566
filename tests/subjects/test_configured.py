"""The dims of a configuration become the drawn dims."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import replay_command, run_law
from mla_spec.operations.decode import DecodeCase
from mla_spec.reference.checkpoint import checkpoint_model
from mla_spec.reference.published import published_model
from mla_spec.subjects.configured import configured_subject, dims_of
from mla_spec.subjects.find import UnknownSubject

CONFIG = {
    "model_type": "deepseek_v32",
    "hidden_size": 32,
    "num_attention_heads": 3,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
    "index_n_heads": 2,
    "index_head_dim": 12,
}
LAWS = {
    "test_decode_agrees_with_reference": {"num_heads": 3, "kv_lora_rank": 20, "qk_rope_head_dim": 2},
    "test_prefill_agrees_with_reference": {"num_heads": 3, "qk_head_dim": 8, "v_head_dim": 5},
    "test_indexer_selects_the_largest_logits": {"num_heads": 2, "head_dim": 12},
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    target = tmp_path / "config.json"
    target.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(target)


def test_dims_of_a_model() -> None:
    dims = {"num_heads": 128, "latent_dims": (512, 64), "prefill_dims": (192, 128)}
    assert dict(dims_of(published_model("DeepSeek-V3"))) == dims
    assert dict(dims_of(published_model("DeepSeek-V3.2(-Exp)"))) == {**dims, "indexer_dims": (64, 128)}
    with pytest.raises(ValueError, match=r"^DeepSeek-V4-Pro: attention is 'shared-kv-mqa', not MLA$"):
        dims_of(published_model("DeepSeek-V4-Pro"))


@pytest.mark.parametrize("law", LAWS)
def test_only_these_dims_are_drawn(law: str) -> None:
    seen: list[Any] = []
    subject = configured_subject("torch-absorbed", dims=dims_of(checkpoint_model(CONFIG)))
    record = run_law(all_laws()[law], subject, Options(examples=12, dtypes=("float64",), announce=seen.append))
    assert record.verdict == "pass", record.text()
    assert seen
    for case in seen:
        assert {field: getattr(case, field) for field in LAWS[law]} == LAWS[law], case.id


def test_dims_that_a_subject_does_not_support_are_named(tmp_path: Path) -> None:
    kernel = tmp_path / "of_sixteen_heads.py"
    kernel.write_text(
        "from mla_spec.adapters.pytorch import TorchAbsorbed\n"
        "from mla_spec.subjects.supports import Supports\n"
        "class Kernel(TorchAbsorbed):\n    supports = Supports(num_heads=(16,))\n"
        "class Fixed(TorchAbsorbed):\n    supports = property(lambda self: Supports())\n"
    )
    dims = dims_of(checkpoint_model(CONFIG))
    with pytest.raises(UnknownSubject, match=r"supports num_heads=\(16,\), not 3 of the configuration$"):
        configured_subject(f"{kernel}:Kernel", dims=dims)
    with pytest.raises(UnknownSubject, match="supports cannot be set to the dims of a configuration"):
        configured_subject(f"{kernel}:Fixed", dims=dims)
    sys.modules.pop("of_sixteen_heads", None)


@pytest.mark.parametrize("where", [["--in-process"], ["--jobs", "1"]])
def test_check_names_the_dims_and_the_configuration(
    where: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    law = ["--law", "test_decode_agrees_with_reference", "--examples", "4", "--seed", "0", "--dtype", "float32"]
    assert main(["check", "torch-absorbed", "--config", path, *law, *where, "-v"]) == 0
    out = capsys.readouterr().out
    for declared in ("num_heads=(3,)", "latent_dims=((20, 2),)", "prefill_dims=((8, 5),)", "indexer_dims=((2, 12),)"):
        assert declared in out


def test_replay_commands_name_the_configuration(path: str) -> None:
    options = Options(spec=("torch-absorbed", "--config", path))
    assert f"torch-absorbed --config {path} --law some_law" in replay_command(
        "some_law", DecodeCase(dtype="float32"), options
    )


def test_subjects_made_without_a_configuration_keep_their_own_dims() -> None:
    assert configured_subject("torch-absorbed").supports == TorchAbsorbed().supports
