"""Expected failures in every way in: applied, counted, and refused where they are not needed."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.front.cli import main
from mla_spec.judging.check import check_subject
from mla_spec.judging.law import Options
from mla_spec.judging.waivers import WaiverError, read_waivers

pytest_plugins = ["pytester"]

KERNEL = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Rope:
    name = "fused"

    def rope(self, x, *arguments, **options):
        out = TorchAbsorbed().rope(x, *arguments, **options)
        return 2 * out if str(x.dtype) in ("torch.float32", "torch.float16") else out
"""
LAW = "test_rope_preserves_norm"
GOOD = "test_rope_output_is_not_aliased"
REASON = "the factor is applied elsewhere"


def waiver(law: str = LAW, expires: str = "2999-01-01", **fields: str) -> str:
    entries = {"law": f'"{law}"', "reason": f'"{REASON}"', "expires": expires}
    entries |= {name: f'"{value}"' for name, value in fields.items()}
    return "[[waiver]]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    return path


def check(kernel: Path, text: str, *more: str) -> int:
    file = kernel.parent / "waivers.toml"
    file.write_text(text)
    laws = ("--law", LAW, "--law", GOOD, "--examples", "8", "--seed", "0", "--in-process", "--explain", "0")
    return main(["check", f"{kernel}:Rope", *laws, "--waivers", str(file), *more])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (waiver(), 0),
        (waiver("test_rope_*norm"), 0),
        (waiver(subject="fused"), 0),
        (waiver(subject="*kernel.py:Rope"), 0),
        (waiver(dtype="float16") + waiver(dtype="float32"), 0),
        (waiver(dtype="float[13]*"), 0),
        (waiver(dtype="float16"), 1),  # float32 fails too
        (waiver(subject="another"), 1),
        (waiver("test_decode_*"), 1),
        (waiver() + waiver(GOOD), 1),  # not needed
        (waiver() + waiver(dtype="bfloat16"), 1),  # not needed
    ],
)
def test_only_what_is_waived_may_fail(text: str, code: int, kernel: Path) -> None:
    assert check(kernel, text) == code


def test_waived_failures_are_printed_and_counted(kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = kernel.parent / "records.json"
    assert check(kernel, waiver(), "-v", "--json", str(target)) == 0
    out = capsys.readouterr().out
    assert f"1 law waived: {REASON} (until 2999-01-01)" in out
    assert f"waived: {LAW}: fail: {REASON} (until 2999-01-01)" in out
    assert "1 pass, 1 waived in" in out
    records = {record["law"]: record for record in json.loads(target.read_text())}
    assert records[LAW]["verdict"] == "fail"
    assert records[LAW]["waived"] == f"{REASON} (until 2999-01-01)"
    assert records[GOOD]["waived"] == ""


def test_a_waiver_that_is_not_needed_is_named(kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(kernel, waiver() + waiver(GOOD)) == 1
    message = f"the waiver of {GOOD} is not needed: none of its 4 cells fails, 4 pass"
    assert message in capsys.readouterr().err


def test_shards_leave_it_to_the_merge_which_waivers_are_needed(kernel: Path) -> None:
    text = waiver(dtype="float16") + waiver(dtype="float32")
    files = [str(kernel.parent / f"{i}.jsonl") for i in (1, 2, 3)]
    for i, file in enumerate(files, 1):
        assert check(kernel, text, "--shard", f"{i}/3", "--records", file) == 0
    asked = ["merge", *files, "--waivers", str(kernel.parent / "waivers.toml")]
    assert main(asked) == 0
    assert main(asked[:-2]) == 1
    (kernel.parent / "waivers.toml").write_text(text + waiver(dtype="bfloat16"))
    assert main(asked) == 1


REFUSED = {
    "": "expected tables [[waiver]] and nothing else",
    "[waiver]\nlaw = 'a'": "expected tables [[waiver]] and nothing else",
    waiver() + "[more]\n": "expected tables [[waiver]] and nothing else",
    "[[waiver]": "not TOML in UTF-8",
    waiver("test_none_*"): "waiver 1: no law matches 'test_none_*'",
    waiver(dtype="bf16"): "waiver 1: no dtype matches 'bf16'",
    waiver(expires="2020-01-01"): f"waiver 1 of {LAW} expired on 2020-01-01",
    waiver(expires="2999-01-01T00:00:00"): "expected a day without a time",
    waiver(expires='"2999-01-01"'): "waiver 1: expires is '2999-01-01'; expected a date",
    waiver(reason=" "): f"waiver 1 of {LAW} has no reason",
    waiver(rtol="0.1"): "waiver 1 has the unknown field 'rtol'",
    "[[waiver]]\nlaw = 'test_rope_preserves_norm'\n": "missing 2 required positional arguments",
    "[[waiver]]\nlaw = 3\n": "waiver 1: law is 3; expected a string",
    "waiver = [1]": "waiver 1 is 1; expected an object",
    "a = " + "[" * 5000: "not TOML in UTF-8",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    text: str, kernel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(kernel, text) == 2
    captured = capsys.readouterr()
    assert REFUSED[text] in captured.err
    assert captured.err.startswith("mla-spec: --waivers ")
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_a_file_of_any_bytes_is_refused(kernel: Path) -> None:
    file = kernel.parent / "waivers.toml"
    for data in (b"\xff\xfe\x00", b"\x00" * 100, b"[[waiver]]\nlaw = '\xc3'"):
        file.write_bytes(data)
        with pytest.raises(WaiverError, match="not TOML in UTF-8"):
            read_waivers(str(file))


def test_the_last_day_counts(kernel: Path) -> None:
    file = kernel.parent / "waivers.toml"
    file.write_text(waiver(expires="2026-03-01"))
    assert read_waivers(str(file), date(2026, 3, 1)).every
    with pytest.raises(WaiverError, match="expired on 2026-03-01"):
        read_waivers(str(file), date(2026, 3, 2))


class Doubled(TorchAbsorbed):
    name = "doubled"

    def rotate(self, x: object, *arguments: object) -> object:  # type: ignore[override]
        return super().rotate(2 * x, *arguments)  # type: ignore[operator, arg-type]


def test_a_subject_checked_in_python_takes_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "waivers.toml"
    file.write_text(waiver())
    options = Options(examples=4, seed=0, dtypes=("float32",))
    (record,) = check_subject(Doubled(), laws=[LAW], options=options, waivers=file)
    assert (record.verdict, record.waived) == ("fail", f"{REASON} (until 2999-01-01)")
    with pytest.raises(ValueError, match="is not needed"):
        check_subject(TorchAbsorbed(), laws=[LAW], options=options, waivers=file)


PYTEST = ("-p", "no:xdist", "-p", "no:cacheprovider")


@pytest.mark.parametrize("way", [(), ("--mla-in-process",)])
def test_the_laws_as_tests_take_the_same_file(way: tuple[str, ...], kernel: Path, pytester: pytest.Pytester) -> None:
    laws = ("--pyargs", "mla_spec.properties.test_rope", "--mla-examples", "8", "--mla-seed", "0", "-rx")
    laws += ("--mla-impl", f"{kernel}:Rope")
    file = kernel.parent / "waivers.toml"
    names = (
        "test_rope_agrees*",
        "test_rope_preserves*",
        "test_rope_at_position*",
        "test_rope_takes*",
        "test_rope_of_many*",
        "test_rope_depends*",
    )
    file.write_text("".join(waiver(name, subject="fused") for name in names))
    done = pytester.runpytest_subprocess(*laws, *way, "--mla-waivers", str(file), *PYTEST)
    assert done.ret == 0
    assert done.parseoutcomes()["xfailed"] == 6
    done.stdout.fnmatch_lines(["mla-spec: 11 cells fail as 6 waivers expect", f"*{REASON} (until 2999-01-01)*"])
    file.write_text(file.read_text() + waiver("test_rope_layouts*"))
    done = pytester.runpytest_subprocess(*laws, *way, "--mla-waivers", str(file), *PYTEST)
    assert done.ret == 1
    done.stdout.fnmatch_lines(
        ["mla-spec: the waiver of test_rope_layouts[*] is not needed: none of its 4 cells fails, 4 pass"]
    )


def test_a_file_that_is_none_is_a_usage_error_of_pytest(kernel: Path, pytester: pytest.Pytester) -> None:
    file = kernel.parent / "waivers.toml"
    file.write_text(waiver(expires="2020-01-01"))
    laws = ("--pyargs", "mla_spec.properties.test_rope", "--mla-impl", f"{kernel}:Rope", "-k", "norm")
    done = pytester.runpytest_inprocess(*laws, "--mla-waivers", str(file), *PYTEST)
    assert done.ret != 0
    done.stdout.fnmatch_lines([f"*--mla-waivers *waiver 1 of {LAW} expired on 2020-01-01*"])


def test_parametrize_with_checks_takes_the_same_file(kernel: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(kernel=KERNEL)
    pytester.makefile(".toml", waivers=waiver("test_rope_*") + waiver("test_decode_agrees_with_reference"))
    pytester.makepyfile(
        test_mine="""
        from kernel import Rope
        from mla_spec import Options, parametrize_with_checks

        options = Options(examples=8, seed=0, dtypes=("float32",))

        @parametrize_with_checks([Rope()], options=options, waivers="waivers.toml")
        def test_mla(subject, check):
            check(subject)
        """
    )
    done = pytester.runpytest_subprocess(
        "-k", "test_rope_preserves_norm or test_rope_output_is_not_aliased", "-rx", *PYTEST
    )
    assert (done.ret, done.parseoutcomes()["xfailed"], done.parseoutcomes()["passed"]) == (0, 1, 1)
    done.stdout.fnmatch_lines([f"*{REASON}*"])


def test_laws_are_chosen_by_pattern_and_by_operation(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("-v", "--examples", "1", "--seed", "0", "--dtype", "float32", "--in-process")
    assert main(["check", "torch-absorbed", "--law", "test_*_splits_kv_b_proj", *common]) == 0
    assert "test_absorb_splits_kv_b_proj" in capsys.readouterr().out
    assert main(["check", "torch-absorbed", "--law", "absorb", *common]) == 0
    out = capsys.readouterr().out
    assert "test_absorb_splits_kv_b_proj" in out
    assert "test_absorb_output_is_not_aliased" in out
    assert "test_rope_preserves_norm" not in out
    assert main(["check", "torch-absorbed", "--law", "test_nothing_*", *common]) == 2
    assert "unknown law 'test_nothing_*'" in capsys.readouterr().err
