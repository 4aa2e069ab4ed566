"""DeepSeek-V3's inference code as a subject: a file of its interface conforms in both forms, and with a fault does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mla_spec import Options
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.environment import code_of
from mla_spec.judging.run import run_law
from mla_spec.subjects.find import BrokenSubject, UnknownSubject, resolve_subject

MODEL = Path(__file__).with_name("deepseek_model.py")
LAWS = [name for name, law in all_laws().items() if law.needs == ("layer",)]
FORMS = ["deepseek", "deepseek-naive"]
PREFILL, DECODE = "test_layer_prefill_agrees_with_reference", "test_layer_decode_agrees_with_reference"


@pytest.fixture(autouse=True)
def no_kernel_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's file imports a module ``kernel``, as subjects of other tests are called that were checked in this process."""
    monkeypatch.delitem(sys.modules, "kernel", raising=False)


@pytest.mark.parametrize("form", FORMS)
def test_a_correct_file_conforms(form: str) -> None:
    subject = resolve_subject(f"{form}:{MODEL}")
    # In 16 bits attention over 4161 tokens in rows of 512 takes a CPU half a minute.
    dtypes = {"test_layer_of_thousands_of_cached_tokens": ("float32",)}
    records = [run_law(all_laws()[law], subject, Options(examples=6, dtypes=dtypes.get(law))) for law in LAWS]
    assert [r.text() for r in records if r.verdict not in ("pass", "unsupported")] == []
    assert sum(r.verdict == "pass" for r in records) >= 13


FAULTS = {
    "the scale is not corrected for YaRN": ("self.scale *= (", "self.scale *= 1 or ("),
    "keys are cached one slot late": ("latent, k_pe.squeeze(2)", "latent.roll(1, 1), k_pe.squeeze(2)"),
    "no causal mask": ("scores = scores + mask.unsqueeze(1)", "pass"),
    "k_pe is not rotated": ("rotated(k_pe.unsqueeze(2), freqs_cis)", "k_pe.unsqueeze(2)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_does_not(fault: str, tmp_path: Path) -> None:
    right, wrong = FAULTS[fault]
    text = MODEL.read_text(encoding="utf-8")
    assert right in text
    file = tmp_path / "model.py"
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    subject = resolve_subject(f"deepseek:{file}")
    verdicts = [
        run_law(all_laws()[law], subject, Options(examples=30, minimise=False)).verdict for law in (PREFILL, DECODE)
    ]
    assert "fail" in verdicts


def test_from_the_command_line_and_in_records(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--law", PREFILL, "--dtype", "float32", "--examples", "4", "--seed", "0", "-v"]
    assert main(["check", f"deepseek:{MODEL}", *arguments, "--in-process"]) == 0
    out = capsys.readouterr().out
    assert "deepseek:deepseek_model.py: offers layer" in out
    assert "positions are one row for all sequences" in out
    assert code_of(f"deepseek:{MODEL}")["source"]


def test_what_is_no_such_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("attn_impl = 'absorb'\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("import kernel\nraise RuntimeError('no GPU')\n", encoding="utf-8")
    with pytest.raises(UnknownSubject, match=r"has no MLA, ModelArgs, precompute_freqs_cis; expected DeepSeek-V3"):
        resolve_subject(f"deepseek:{tmp_path / 'other.py'}")
    with pytest.raises(BrokenSubject, match="no GPU"):
        resolve_subject(f"deepseek:{tmp_path / 'broken.py'}")
    with pytest.raises(UnknownSubject, match="no such file"):
        resolve_subject(f"deepseek:{tmp_path / 'none.py'}")
