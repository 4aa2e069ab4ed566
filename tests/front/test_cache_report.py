"""``mla-spec cache`` with tensor parallelism, and for models whose layers differ."""

from __future__ import annotations

import pytest

from mla_spec.front.cache_report import cache_report
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
    assert rows["MHA"][6:] == ["22.5", "%"]
    assert on_all["MHA"] == whole["MHA"]


def test_one_rank_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert table("GLM-4.7-Flash", capsys=capsys) == table("GLM-4.7-Flash", "--tp", "1", capsys=capsys)


def test_layers_without_rotary_embedding_cache_the_latent_only(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table("Mistral-Large-4-1T-A52B", "--page-size", "64", capsys=capsys)
    token = 2 * (54 * 576 + 18 * 512)
    assert rows["MLA"] == ["576", "1152", str(token), str(64 * token)]
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
    assert row[4:] == [str(61 * 41984), str(61 * 41984), str(8 * 61 * 41984)]


@pytest.mark.parametrize("of_a_cache", [("--layout", "fp8_ds_mla"), ("--page-size", "64"), ("--tp", "8")])
def test_training_refuses_what_is_of_a_cache(of_a_cache: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "DeepSeek-V3", "--training"]) == 0
    assert "51840" in capsys.readouterr().out
    assert main(["cache", "DeepSeek-V3", "--training", *of_a_cache]) == 2
    assert f"{of_a_cache[0]} is of a cache, which --training does not print" in capsys.readouterr().err
