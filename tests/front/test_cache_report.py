"""``mla-spec cache`` with tensor parallelism, for models whose layers differ or have an indexer, and for configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_spec.front.cache_report import binary_size, cache_report
from mla_spec.front.cli import main


def table(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Cells of each row by its first."""
    assert main(["cache", *arguments]) == 0
    return {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}


def test_the_latent_is_on_every_rank_and_heads_are_divided(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table("DeepSeek-V3", "--tokens", "3", "--tp", "16", capsys=capsys)
    token = {"MLA": 70272, "MHA": 128 * 320 * 2 * 61, "GQA-8": 8 * 320 * 2 * 61, "MQA": 320 * 2 * 61}
    whole = {name: 3 * size for name, size in token.items()}
    on_a_rank = {"MLA": whole["MLA"], "MHA": whole["MHA"] // 16, "GQA-8": whole["MQA"], "MQA": whole["MQA"]}
    on_all = {name: 16 * size for name, size in on_a_rank.items()}
    for name in token:
        assert rows[name][3:6] == [str(whole[name]), str(on_a_rank[name]), str(on_all[name])]
    assert rows["MHA"][6:8] == ["22.5", "%"]
    assert on_all["MHA"] == whole["MHA"]


def test_one_rank_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert table("GLM-4.7-Flash", capsys=capsys) == table("GLM-4.7-Flash", "--tp", "1", capsys=capsys)


def test_layers_without_rotary_embedding_cache_the_latent_only(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table("Mistral-Large-4-1T-A52B", "--page-size", "64", capsys=capsys)
    token = 2 * (54 * 576 + 18 * 512)
    assert rows["MLA"][:4] == ["576", "1152", str(token), str(64 * token)]
    assert rows["18"] == ["layers", "cache", "512", "elements"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DeepSeek-V3", "--tp", "3"], "128 heads cannot be divided among 3 ranks"),
        (["DeepSeek-V3", "--tp", "256"], "128 heads cannot be divided among 256 ranks"),
        (["DeepSeek-V3", "--tp", "0"], "tp must be at least 1, got 0"),
        (["DeepSeek-V3", "--tp", "two"], "argument --tp: invalid int value: 'two'"),
        (["DeepSeek-V3", "--page-size", "0"], "page size must be at least 1, got 0"),
        (["GigaChat3-702B / 10B"], "GigaChat3-702B / 10B: the number of layers is not published"),
        (["Mistral-Large-4-1T-A52B", "--layout", "fp8_ds_mla"], "caches rows of 576 and 512 and 128"),
    ],
)
def test_bad_values_are_one_sentence_and_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_layout_is_on_every_rank_too() -> None:
    report = cache_report("DeepSeek-V3", "bfloat16", 64, 1, 64, layout="fp8_ds_mla", tensor_parallel=8)
    row = next(line.split() for line in report.splitlines() if line.startswith("fp8_ds_mla"))
    assert row[4:7] == [str(61 * 41984), str(61 * 41984), str(8 * 61 * 41984)]


@pytest.mark.parametrize("of_a_cache", [("--layout", "fp8_ds_mla"), ("--page-size", "64"), ("--tp", "8")])
def test_training_refuses_what_is_of_a_cache(of_a_cache: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "DeepSeek-V3", "--training"]) == 0
    assert "51840" in capsys.readouterr().out
    assert main(["cache", "DeepSeek-V3", "--training", *of_a_cache]) == 2
    assert f"{of_a_cache[0]} is of a cache, which --training does not print" in capsys.readouterr().err


def test_indexer_keys_are_in_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    """SGLang, issue 11309: 1,462,784 tokens of DeepSeek-V3.2 in 54.52 "GB" without and 65.49 with the keys of the indexer."""
    rows = table("DeepSeek-V3.2(-Exp)", "--tokens", "1462784", "--layout", "fp8_ds_mla", capsys=capsys)
    tokens, latents, keys = 1462784, 61 * 656, 61 * 132
    assert rows["fp8_ds_mla"][-2:] == ["54.515", "GiB"]
    assert rows["indexer_fp8"][:4] == ["128", "132", str(keys), str(tokens * keys)]
    assert rows["fp8_ds_mla+indexer_fp8"][:2] == [str(latents + keys), str(tokens * (latents + keys))]
    assert rows["fp8_ds_mla+indexer_fp8"][-2:] == ["65.484", "GiB"]


def test_indexer_layouts_of_other_widths_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    token = 78 * 1152
    assert table("GLM-5.2 / 5.3", capsys=capsys)["MLA+indexer_fp8"][0] == str(token + 21 * 132)
    rows = table("GLM-5.2 / 5.3", "--layout", "indexer_mxfp4", capsys=capsys)
    assert rows["MLA+indexer_mxfp4"][0] == str(token + 21 * 68)
    assert "indexer_fp8" not in rows
    report = cache_report("GLM-5.3-Flash (glm5_next)", "bfloat16", 1, 1, 1)
    assert "the keys of the indexer are pooled over tokens, and not counted" in report
    assert "indexer_fp8" not in report


@pytest.mark.parametrize(
    ("name", "tokens", "size"),
    [
        ("DeepSeek-V3", 131072, "8.578 GiB"),
        ("DeepSeek-V3", 163840, "10.723 GiB"),
        ("DeepSeek-V3", 1048576, "68.625 GiB"),
        ("GLM-4.7-Flash", 1, "52.875 KiB"),
        ("GLM-5", 1, "87.750 KiB"),
    ],
)
def test_public_figures_are_reproduced(name: str, tokens: int, size: str) -> None:
    """GLM-4.7-Flash: 54144 bytes a token; GLM-5: 89856 without its indexer."""
    row = cache_report(name, "bfloat16", tokens, 1, 1).splitlines()[2]
    assert row.split()[0] == "MLA"
    assert row.endswith(size)


def test_sizes_are_in_the_largest_unit_that_they_fill() -> None:
    sizes = [binary_size(count) for count in (0, 1023, 1024, 2**20 - 1, 3 * 2**39)]
    assert sizes == ["0 B", "1023 B", "1.000 KiB", "1023.999 KiB", "1.500 TiB"]


def test_configuration_file_gives_what_the_published_model_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "dim": 7168,
        "n_layers": 61,
        "n_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_head_dim": 128,
        "index_n_heads": 64,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    want = table("DeepSeek-V3.2(-Exp)", "--tokens", "9", capsys=capsys)
    assert table(str(path), "--tokens", "9", capsys=capsys) == want
    assert table(str(tmp_path), "--tokens", "9", capsys=capsys) == want
    assert main(["cache", str(path), "--training", "--tokens", "9"]) == 0
    own = capsys.readouterr().out.splitlines()
    assert main(["cache", "DeepSeek-V3.2(-Exp)", "--training", "--tokens", "9"]) == 0
    assert own[1:] == capsys.readouterr().out.splitlines()[1:]
