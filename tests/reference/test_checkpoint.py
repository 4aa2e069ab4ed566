"""Configuration files: real ones against the table of published models, and what is refused rather than guessed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.reference.checkpoint import ARCHITECTURES, checkpoint_model, is_checkpoint
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.published import published_model
from mla_spec.reference.rope import rope_frequencies

REAL: list[dict[str, Any]] = json.loads(Path(__file__).with_name("configurations.json").read_text(encoding="utf-8"))

SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "rope_theta": 10000,
    "max_position_embeddings": 64,
}
YARN = {"factor": 40, "original_max_position_embeddings": 4096}


def read(**changes: Any) -> MLAConfig:
    return MLAConfig.from_hf({**SMALL, **changes})


def test_there_are_twelve_real_ones_and_each_names_its_source() -> None:
    assert len(REAL) >= 12
    assert all(entry["source"] for entry in REAL)


@pytest.mark.parametrize(
    "entry", REAL, ids=lambda entry: f"{entry['model']}-{entry['config'].get('model_type', 'own')}"
)
def test_real_configuration_is_the_published_model(entry: dict[str, Any], tmp_path: Path) -> None:
    """From the mapping, its text, its file and the folder of the file."""
    (tmp_path / "config.json").write_text(json.dumps(entry["config"]), encoding="utf-8")
    sources = (entry["config"], json.dumps(entry["config"]), tmp_path / "config.json", str(tmp_path))
    config, *others = (MLAConfig.from_hf(source) for source in sources)
    assert all(other == config for other in others)
    want = MLAConfig.published(entry["model"])
    assert replace(config, rope=None) == replace(want, rope=None)
    assert config.scale == want.scale
    if want.rope is None:
        assert config.rope is None
        return
    assert config.rope is not None
    assert config.rope.interleaved == want.rope.interleaved
    assert config.rope.cos_sin_factor == want.rope.cos_sin_factor
    np.testing.assert_array_equal(rope_frequencies(config.rope), rope_frequencies(want.rope))


@pytest.mark.parametrize("entry", REAL, ids=lambda entry: entry["model"])
def test_real_configuration_counts_its_caches(entry: dict[str, Any]) -> None:
    model, published = checkpoint_model(entry["config"]), published_model(entry["model"])
    assert model.num_cached_layers == entry["layers"] == published.num_cached_layers
    assert model.fields.get("num_indexer_layers") == entry.get("indexer_layers")
    assert published.fields.get("num_indexer_layers") == entry.get("indexer_layers")


def test_architectures_agree_with_the_table() -> None:
    known = {"minicpm3": "MiniCPM3-4B", "hy_v4": "Hy4-preview (class default)", "kimi_k2": "Kimi-K2-Thinking"}
    known |= {"sarvam_mla": "Sarvam-105B", "axk1": "A.X-K1", "dots3_note_text": "dots3-note-prev (DSA layers)"}
    for kind, name in known.items():
        fields, architecture = published_model(name).fields, ARCHITECTURES[kind]
        assert architecture.interleaved == fields["rope_interleave"]
        eps = fields["rms_norm_eps"] if architecture.passes_eps else 1e-6
        assert eps == fields["latent_norm_eps"]


def test_no_query_compression_is_0_or_null() -> None:
    assert read(q_lora_rank=0) == read(q_lora_rank=None)
    assert read(q_lora_rank=0).q_lora_rank is None


def test_theta_may_stand_in_either_place() -> None:
    inside = read(rope_theta=None, rope_scaling={"rope_type": "default", "rope_theta": 50000})
    assert inside == read(rope_theta=50000) == read(rope_theta=50000, rope_parameters={"rope_theta": 50000})
    assert inside.rope is not None
    assert inside.rope.theta == 50000


def test_value_width_is_the_heads_share_of_the_hidden_size_where_it_is_null() -> None:
    assert read(v_head_dim=None).v_head_dim == 8


def test_shortened_configuration_determines_the_cache_but_not_the_layer() -> None:
    short = {key: value for key, value in SMALL.items() if key != "rope_theta"}
    assert checkpoint_model(short).latent_rows() == [(3, 12)]
    with pytest.raises(ValueError, match=r"^deepseek_v3: rope_theta is not stated$"):
        MLAConfig.from_hf(short)


def test_layers_without_a_growing_cache_are_not_counted() -> None:
    kinds = ["linear_attention", "full_attention", "indexed_attention"]
    assert checkpoint_model({**SMALL, "layer_types": kinds}).num_cached_layers == 2
    grouped = {**SMALL, "num_hidden_layers": 9, "layer_group_size": 4}
    assert checkpoint_model(grouped).num_cached_layers == 3  # of layers 3, 7 and 8


def test_shared_indexers_keep_no_keys() -> None:
    base = {**SMALL, "index_head_dim": 8, "num_hidden_layers": 6}
    assert checkpoint_model(base).fields["num_indexer_layers"] == 6
    assert checkpoint_model({**base, "index_topk_pattern": "FSSFSS"}).fields["num_indexer_layers"] == 2
    assert checkpoint_model({**base, "index_topk_freq": 2}).fields["num_indexer_layers"] == 4
    assert checkpoint_model({**base, "indexer_types": ["full"] + 5 * ["shared"]}).fields["num_indexer_layers"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
            "type 'default' has no parameter 'mrope_section'",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN, "finetuned": True}}, "unknown YaRN parameter 'finetuned'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "unknown rope type 'llama3'"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "type is stated twice, as 'yarn' and 'default'"),
        ({"rope_scaling": {"rope_theta": 500}}, "rope_theta is stated twice, as 500 and 10000; expected one value"),
        ({"rope_scaling": {"max_position_embeddings": 1}}, "max_position_embeddings is stated twice, as 1 and 64"),
        ({"rope_scaling": {"factor": 2}, "rope_parameters": {"factor": 3}}, "contradict each other"),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected a JSON object, got 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "must leave 4 rotated dims, got 0.25"),
        ({"model_type": "gpt9"}, "gpt9: MLAConfig does not express \"model_type 'gpt9'\""),
        ({"attention_bias": True}, "MLAConfig does not express 'attention_bias'"),
        ({"sliding_window": 512}, "MLAConfig does not express 'sliding_window'"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types: expected one of full_attention"),
        ({"kv_lora_rank": None}, "kv_lora_rank is not stated, so that attention is not MLA"),
        ({"use_mla": False}, "use_mla is false, so that attention is not MLA"),
        ({"compress_ratios": [0, 4]}, "DeepSeek-V4, whose attention shares one KV head and is not MLA"),
        ({"qk_rope_head_dim": None}, "qk_rope_head_dim is not stated"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank must be a positive integer, got '512'"),
        ({"num_attention_heads": None}, "num_attention_heads is not stated"),
        ({"dim": 4, "n_heads": 2, "yarn": {}}, "'yarn' is of Mistral's params.json"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


def test_window_that_is_not_used_is_no_matter() -> None:
    assert read(sliding_window=512, use_sliding_window=False) == read()


def test_yarn_of_deepseeks_own_code_begins_beyond_the_original_context() -> None:
    own = {"dim": 16, "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 5}
    short = MLAConfig.from_hf({**own, "max_seq_len": 4096})
    assert short.scale == pytest.approx(8**-0.5)
    assert MLAConfig.from_hf(own).scale > short.scale


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_unreadable_file_is_one_sentence_that_names_it(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        MLAConfig.from_hf(path)


def test_paths_are_told_from_names(tmp_path: Path) -> None:
    assert is_checkpoint("config.json")
    assert is_checkpoint(str(tmp_path))
    assert not is_checkpoint("DeepSeek-V3")
