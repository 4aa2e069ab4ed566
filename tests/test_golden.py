"""The golden files: they verify, regenerate to the same bytes, and every kind of damage is named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.golden import arrays, compare, corpus, figures
from mla_spec.golden.case import Case, rope_from
from mla_spec.golden.corpus import CorpusError
from mla_spec.golden.generate import cases
from mla_spec.harness.cli import main
from mla_spec.reference import attention as reference_attention
from mla_spec.reference import cache_layout
from mla_spec.reference.config import RopeConfig, YarnScaling
from mla_spec.reference.formats import decode_bits, round_to
from mla_spec.reference.merge import merge
from mla_spec.reference.quantised_cache import dequantise
from mla_spec.reference.rope import half_from_interleaved
from mla_spec.reference.typing import Array

needs_flint = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('flint')", reason="python-flint")

ARRAY = "arrays/decode-paged.out.npy"


def contents(root: Path) -> dict[str, bytes]:
    names = ["manifest.json", *figures.DOCUMENTS, *(f"arrays/{p.name}" for p in (root / "arrays").iterdir())]
    return {name: (root / name).read_bytes() for name in names}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed corpus."""
    root = tmp_path / "corpus"
    root.mkdir()
    shutil.copytree(corpus.installed() / "arrays", root / "arrays")
    for name in ("manifest.json", *figures.DOCUMENTS):
        shutil.copy(corpus.installed() / name, root / name)
    return root


def edit_manifest(root: Path, change: Callable[[Any], None]) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def entry_of(manifest: Any, file: str = ARRAY) -> Any:
    return next(a for case in manifest["cases"] for a in case["arrays"] if a["file"] == file)


# The corpus as it is


def test_the_installed_corpus_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["golden", "verify"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{len(cases())} cases, ")
    assert "the float64 reference agrees: worst error/bound 0." in text


def test_the_corpus_is_small_and_needs_no_pickle() -> None:
    files = contents(corpus.installed())
    assert sum(map(len, files.values())) < 2**20
    for name in files:
        if name.endswith(".npy"):
            np.load(corpus.installed() / name, allow_pickle=False)


def test_stored_inputs_are_those_of_the_generator() -> None:
    for stored, case in zip(corpus.load(), cases(), strict=True):
        assert stored.name == case.name
        for name, values in case.inputs.items():
            np.testing.assert_array_equal(stored.inputs[name], values)


def test_the_two_rope_layouts_hold_the_same_answers() -> None:
    stored = {case.name: case for case in corpus.load()}
    p = half_from_interleaved(8)
    half, interleaved = stored["rope-half"].expected["out"], stored["rope-interleaved"].expected["out"]
    np.testing.assert_array_equal(half, interleaved[..., p])


def test_no_allowance_is_vacuous() -> None:
    for case in corpus.load():
        for got in compare.COMPUTED[case.operation](case.inputs, case.parameters):
            want = case.expected[got.name]
            if got.name not in case.exact:
                seen = np.isfinite(want) & (got.error > 0)
                rms = np.sqrt(np.mean(want[seen] ** 2)) if seen.any() else 1.0
                # As far below bfloat16's roundoff as float64 is below float32's.
                assert np.median(got.error[seen] if seen.any() else 0.0) < 2.0**-29 * rms, (case.name, got.name)


# The format, read by its description alone

ELEMENTS = {"<f8": "d", "<f4": "f", "<f2": "e", "<i8": "q", "<i4": "i", "|u1": "B", "<u2": "H"}


def read_by_hand(root: Path, entry: dict[str, Any]) -> tuple[float, ...]:
    """The elements of an array, with no more than README.md says."""
    data = (root / entry["file"]).read_bytes()
    assert data[:8] == b"\x93NUMPY\x01\x00"
    (n,) = struct.unpack_from("<H", data, 8)
    content = data[10 + n :]
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    values = struct.unpack(f"<{math.prod(entry['shape'])}{ELEMENTS[entry['stored_as']]}", content)
    if entry["dtype"] == "bfloat16":
        return tuple(struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in values)
    return values


def test_the_description_of_the_format_is_enough_to_read_every_array() -> None:
    root = corpus.installed()
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    seen = set()
    for entry, case in zip(manifest["cases"], corpus.load(), strict=True):
        for array in entry["arrays"]:
            values = case.inputs if array["role"] == "input" else case.expected
            np.testing.assert_array_equal(read_by_hand(root, array), values[array["name"]].ravel())
            seen.add(array["stored_as"])
    assert seen == set(arrays.STORED_DTYPES.values()) == set(ELEMENTS)


def test_the_description_names_everything() -> None:
    text = (corpus.installed() / "README.md").read_text(encoding="utf-8").replace("\\|", "|")
    manifest = json.loads((corpus.installed() / "manifest.json").read_text(encoding="utf-8"))
    words = {"`" + stored + "`" for stored in ELEMENTS}
    for case in manifest["cases"]:
        words |= {f"`{case['operation']}`", *(f"`{key}`" for key in case if key != "name")}
    assert [word for word in sorted(words) if word not in text] == []


# Regeneration

SETTINGS = [
    {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"},
    {"OPENBLAS_CORETYPE": "Sandybridge", "OPENBLAS_NUM_THREADS": "2"},
    {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"},
    {"OPENBLAS_CORETYPE": "SkylakeX", "LC_ALL": "C", "PYTHONUTF8": "0"},
    {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F X86_V3 X86_V4", "PYTHONHASHSEED": "1"},
]


@needs_flint
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
def test_regenerating_gives_the_same_bytes_under_any_setting(settings: dict[str, str], tmp_path: Path) -> None:
    new = tmp_path / "new"
    code = (
        "import sys; from mla_spec.golden import corpus as c; c.regenerate(sys.argv[1]); print(c.verify(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(new)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the float64 reference agrees" in done.stdout
    assert contents(new) == contents(corpus.installed())
    assert sorted(p.name for p in new.iterdir()) == ["arrays", *sorted(["manifest.json", *figures.DOCUMENTS])]


@needs_flint
def test_regenerating_says_what_changed_and_heals_it(copy: Path) -> None:
    before = contents(copy)
    assert corpus.regenerate(copy) == "nothing changed"
    data = bytearray(before[ARRAY])
    data[-1] ^= 1
    (copy / ARRAY).write_bytes(bytes(data))
    (copy / "arrays/absorb.w_uk.npy").unlink()
    (copy / "arrays/stray.npy").write_bytes(b"")
    text = "added arrays/absorb.w_uk.npy\nchanged arrays/decode-paged.out.npy\nremoved arrays/stray.npy"
    assert corpus.regenerate(copy) == text
    assert contents(copy) == before


@needs_flint
@pytest.mark.parametrize(
    ("step", "error"),
    [
        *(("computing", error) for error in (RuntimeError, KeyboardInterrupt, OSError)),
        *zip(range(9), [RuntimeError, KeyboardInterrupt, OSError] * 3, strict=True),
    ],
)
def test_an_interrupted_regeneration_leaves_the_old_corpus(
    step: str | int, error: type[BaseException], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / ARRAY).unlink()  # so that there is something to replace
    before = contents(copy)
    rename, left = os.rename, [step]

    def failing_rename(source: Any, target: Any) -> None:
        if left[0] == 0:
            left[0] = -1  # moving back works
            raise error("stop")
        left[0] = int(left[0]) - 1
        rename(source, target)

    def failing_write(*args: Any) -> None:
        raise error("stop")

    if step == "computing":
        monkeypatch.setattr(figures, "DOCUMENTS", {**figures.DOCUMENTS, "cache_sizes.json": failing_write})
    else:
        monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(CorpusError if error is OSError else error):
        corpus.regenerate(copy)
    monkeypatch.undo()
    assert contents(copy) == before
    assert not (copy / ".regenerate").exists()


KILLED = """
import os, signal, sys
from mla_spec.golden import corpus, figures
step, rename, made = int(sys.argv[2]), os.rename, []

def killed_rename(source, target):
    if len(made) == step:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(source)
    rename(source, target)

def killed_write(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

os.rename = killed_rename
if step < 0:
    figures.DOCUMENTS["cache_sizes.json"] = killed_write
corpus.regenerate(sys.argv[1])
"""


@needs_flint
@pytest.mark.parametrize("step", [-1, 0, 3, 4, 6, 8])
def test_a_killed_regeneration_leaves_the_old_corpus(step: int, copy: Path) -> None:
    edit_manifest(copy, lambda m: m["cases"].reverse())  # a corpus that is valid and not the one to come
    before = contents(copy)
    done = subprocess.run([sys.executable, "-c", KILLED, str(copy), str(step)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (copy / ".regenerate").exists()
    corpus.load(copy)
    assert contents(copy) == before
    assert "changed manifest.json" in corpus.regenerate(copy)
    assert contents(copy) == contents(corpus.installed())
    assert not (copy / ".regenerate").exists()


@needs_flint
def test_a_first_regeneration_that_is_killed_can_be_repeated(tmp_path: Path) -> None:
    root = tmp_path / "new"
    for step in (0, 2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(step)], check=False)
        assert done.returncode == -signal.SIGKILL
    corpus.regenerate(root)
    assert contents(root) == contents(corpus.installed())


def test_regenerating_without_flint_names_the_extra(copy: Path) -> None:
    before = contents(copy)
    without = (
        "import sys; sys.modules['flint'] = None; from mla_spec.harness.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for action, code in (("regenerate", 1), ("verify", 0)):
        command = [sys.executable, "-c", without, "golden", action, "--dir", str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code
        if code:
            text = "regenerating needs python-flint, which is not installed: pip install 'mla-spec[golden]'"
            assert done.stderr == f"mla-spec: {text}\n"
    assert contents(copy) == before


def test_regenerating_refuses_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays/mine.txt").write_text("keep")
    with pytest.raises(CorpusError, match=r"has arrays but no manifest\.json"):
        corpus.regenerate(tmp_path)
    with pytest.raises(CorpusError, match="cannot write the corpus in"):
        corpus.regenerate(tmp_path / "no" / "where")
    assert (tmp_path / "arrays/mine.txt").read_text() == "keep"


# Damage


def flip(root: Path, position: int, file: str = ARRAY) -> None:
    data = bytearray((root / file).read_bytes())
    data[position] ^= 1
    (root / file).write_bytes(bytes(data))


def rewrite(root: Path, header: bytes) -> None:
    (root / ARRAY).write_bytes(header + (root / ARRAY).read_bytes()[128:])


def big_header(root: Path) -> None:
    rewrite(root, b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535)


def pickled(root: Path) -> None:
    np.save(root / ARRAY, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def fortran(root: Path) -> None:
    rewrite(root, arrays.header("float64", (4, 1, 3, 6)).replace(b"False,", b"True, "))


def huge_shape(root: Path) -> None:
    edit_manifest(root, lambda m: entry_of(m).update(shape=[2**30, 2**30, 2**30]))


def json_bomb(root: Path) -> None:
    (root / "manifest.json").write_text("[" * 100_000)


def listed_twice(root: Path) -> None:
    edit_manifest(root, lambda m: m["cases"].append(m["cases"][0]))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / ARRAY).unlink(), f"{ARRAY}: the file is missing; manifest.json lists it"),
    (lambda root: (root / "arrays/x.npy").touch(), "arrays/x.npy: unexpected; manifest.json does not list it"),
    (lambda root: flip(root, -1), f"{ARRAY}: the content has sha256 *; expected *"),
    (lambda root: flip(root, 0), f"{ARRAY}: not a .npy file of version 1.0; expected it to begin with *"),
    (lambda root: flip(root, 100), f"{ARRAY}: the header is not as this corpus writes it; *"),
    (big_header, f"{ARRAY}: the header says it is 65535 bytes long; expected 118"),
    (pickled, f"{ARRAY}: the header gives dtype '|O'; expected '<f8'"),
    (fortran, f"{ARRAY}: the header gives order True; expected False"),
    (
        lambda root: rewrite(root, arrays.header("float64", (4, 3, 1, 6))),
        f"{ARRAY}: the header gives shape (4, 3, 1, 6); expected (4, 1, 3, 6)",
    ),
    (
        lambda root: rewrite(root, arrays.header("float16", (4, 1, 3, 6))),
        f"{ARRAY}: the header gives dtype '<f2'; expected '<f8'",
    ),
    (
        lambda root: (root / ARRAY).write_bytes((root / ARRAY).read_bytes()[:-8]),
        f"{ARRAY}: the file has 696 bytes; expected 704 for float64 [4, 1, 3, 6]",
    ),
    (
        lambda root: (root / ARRAY).write_bytes((root / ARRAY).read_bytes()[:50]),
        f"{ARRAY}: the file ends within the header; expected 128 bytes of it",
    ),
    (huge_shape, f"{ARRAY}: the header gives shape (4, 1, 3, 6); expected (1073741824, *"),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(dtype="float128")),
        "manifest.json: array 'out' of case 'decode-paged' has dtype 'float128'; expected one of float64, *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(byte_order="big")),
        "manifest.json: array 'out' of case 'decode-paged' has byte_order 'big'; expected 'little'",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(file="../../etc/passwd")),
        f"manifest.json: array 'out' of case 'decode-paged' is in '../../etc/passwd'; expected '{ARRAY}'",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).pop("sha256")),
        "manifest.json: array 'out' of case 'decode-paged' has no 'sha256'; expected one of JSON type string",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(shape=[4, -1])),
        "manifest.json: array 'out' of case 'decode-paged' has shape [4, -1]; expected a list of sizes",
    ),
    (listed_twice, "manifest.json: case 'rope-table-plain' is listed twice"),
    (
        lambda root: edit_manifest(root, lambda m: m.update(version=99)),
        "manifest.json: version is not 1, which this version reads",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0].update(operation="dance")),
        "case 'rope-table-plain': unknown operation 'dance'; expected one of rope_table, *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0].update(parameters={})),
        "case 'rope-table-plain': rope_table needs 'rope', which the case lacks",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0]["parameters"]["rope"].update(dim=3)),
        "case 'rope-table-plain': rope_table cannot be computed from this case: RopeConfig: dim *",
    ),
    (json_bomb, "manifest.json: not valid JSON in UTF-8: *"),
    (lambda root: (root / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: not valid JSON in UTF-8: *"),
    (
        lambda root: (root / "manifest.json").write_text("[]"),
        "manifest.json: format is not 'mla-spec golden corpus', *",
    ),
    (lambda root: (root / "manifest.json").unlink(), "manifest.json: the file is missing in *"),
    (
        lambda root: (root / "cache_sizes.json").write_text('{"models": ['),
        "cache_sizes.json: not valid JSON in UTF-8: *",
    ),
    (lambda root: (root / "headline_figures.json").unlink(), "headline_figures.json: the file is missing in *"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damage_is_refused_in_one_sentence(number: int, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, sentence = DAMAGE[number]
    damage(copy)
    assert main(["golden", "verify", "--dir", str(copy)]) == 1
    text = capsys.readouterr().err
    parts = f"mla-spec: {sentence}".split("*")
    assert text.startswith(parts[0])
    assert all(part in text for part in parts)
    assert text.count("\n") == 1


def test_a_wrong_count_is_found(copy: Path) -> None:
    path = copy / "cache_sizes.json"
    path.write_text(path.read_text(encoding="utf-8").replace("1152", "1153", 1), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"^cache_sizes\.json: models\[0\]\..* is 1153; expected 1152$"):
        corpus.verify(copy)


# Wrong answers, and a wrong reference


def replace_answer(root: Path, file: str, change: Callable[[Array], Array]) -> None:
    """Change an expected array, and its hash with it."""
    path = root / file
    head, values = path.read_bytes()[:128], np.load(path, allow_pickle=False)
    data = arrays.content(change(values).astype("<f8"))
    path.write_bytes(head + data)
    edit_manifest(root, lambda m: entry_of(m, file).update(sha256=arrays.sha256(data)))


def nudge(ulps: int) -> Callable[[Array], Array]:
    """Move the last element by so many ulps."""

    def change(values: Array) -> Array:
        values = values.copy()
        values.flat[-1] += ulps * np.spacing(values.flat[-1])
        return values

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("arrays/rope-table-yarn.frequencies.npy", nudge(1)),
        ("arrays/absorb.w_uv.npy", nudge(1)),
        ("arrays/decode-one-hot-rope.out.npy", nudge(1)),
        ("arrays/rms-norm-eps.out.npy", nudge(64)),
        ("arrays/rope-interleaved.out.npy", nudge(64)),
        ("arrays/decode-paged.out.npy", nudge(256)),
        ("arrays/merge-far-apart.lse.npy", nudge(256)),
        ("arrays/layer-yarn.decode.npy", nudge(2**20)),
        ("arrays/decode-paged.lse.npy", lambda x: np.where(np.isinf(x), np.inf, x)),
        ("arrays/decode-paged.lse.npy", lambda x: np.where(np.isinf(x), np.nan, x)),
    ],
)
def test_a_wrong_answer_with_the_right_hash_is_found(file: str, change: Callable[[Array], Array], copy: Path) -> None:
    replace_answer(copy, file, change)
    case, array = Path(file).stem.rsplit(".", 1)
    with pytest.raises(CorpusError, match=rf"^case '{case}': {array}\[.* but the reference gives .* allowed "):
        corpus.verify(copy)


def aligned_top_left(limit: Callable[..., Any]) -> Callable[..., Any]:
    """Aligned top-left: query i sees keys 0 .. i."""

    def top_left(q: Array, k: Array, values: Any, cache_seqlens: Any, causal: bool) -> Any:
        seen = limit(q, k, values, cache_seqlens, causal)
        rows = np.tile(np.arange(1, q.shape[-3] + 1), q.shape[-2] // k.shape[-2])
        return np.minimum(rows, k.shape[-3]) + 0 * seen if causal else seen

    return top_left


def test_faults_named_by_the_cases_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {case.name: case for case in corpus.load()}

    def refused_with(name: str, target: Any, attribute: str, value: Any) -> None:
        case = stored[name]
        arguments = (case.operation, case.inputs, case.parameters, case.expected, case.exact)
        compare.compare(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, value)
            with pytest.raises(CorpusError, match="but the reference gives"):
                compare.compare(*arguments)

    def eps_outside(x: Array, weight: Array, eps: float) -> Array:
        return weight * x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps)

    def pages_in_order(**x: Any) -> Any:
        return paged_decode(**{**x, "block_table": np.sort(x["block_table"], axis=1)})

    def truncated(parameters: Any) -> RopeConfig:
        return rope_from({**parameters, "yarn": {**parameters["yarn"], "truncate": True}})

    def merge_in_base_2(outs: Array, lses: Array) -> Any:
        out, lse = merge(outs, lses * math.log(2))
        return out, lse / math.log(2)

    def least_score(**x: Any) -> Any:
        out, lse = paged_decode(**x)
        return np.where(np.moveaxis(lse, 1, 2)[..., None] < -5e4, 0.0, out), lse

    def twice_rounded(x: Array, name: str, **options: Any) -> Array:
        with np.errstate(over="ignore"):
            return round_to(x.astype(np.float32).astype(np.float64), name, **options)

    def bfloat16_scales(stored: Any, layout: Any) -> Array:
        return dequantise(replace(stored, scales=round_to(stored.scales, "bfloat16")), layout)

    def scales_beside_codes(name: str) -> Any:
        return replace(cache_layout.layout_of(name), row=("codes", "scales", "plain"), tail=())

    paged_decode, limit = compare.paged_decode, reference_attention._visible_keys
    refused_with("layer-yarn", YarnScaling, "softmax_factor", 1.0)
    refused_with("rope-yarn-factor", YarnScaling, "cos_sin_factor", 1.0)
    refused_with("rms-norm-eps", compare, "rms_norm", eps_outside)
    refused_with("decode-paged", compare, "paged_decode", pages_in_order)
    refused_with("rope-table-yarn-untruncated", compare, "rope_from", truncated)
    refused_with("merge-three-parts", compare, "merge", merge_in_base_2)
    refused_with("decode-beyond-float16", compare, "paged_decode", least_score)
    refused_with("bits-e5m2", compare, "decode_bits", lambda bits, name: decode_bits(bits, "float8_e4m3fn"))
    refused_with("round-bfloat16", compare, "round_to", twice_rounded)
    refused_with("unpack-fp8-ds-mla", compare, "dequantise", bfloat16_scales)
    refused_with("pack-nvfp4-ds-mla", cache_layout, "_scale_order", lambda layout: np.arange(layout.groups))
    refused_with("unpack-deepseek-v4", compare, "layout_of", scales_beside_codes)
    refused_with("prefill-ragged", reference_attention, "_visible_keys", aligned_top_left(limit))


def test_values_that_a_dtype_does_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="not exactly representable in bfloat16"):
        arrays.encode(np.array([1.0, 1 + 2.0**-8]), "bfloat16")
    values = np.array([-0.0, 1.5, -(2.0**-133), np.inf, np.nan])
    np.testing.assert_array_equal(arrays.decode(arrays.encode(values, "bfloat16"), "bfloat16"), values)


def test_a_figure_that_does_not_round_to_the_published_one_is_refused() -> None:
    figure = figures.figures()[0]
    assert str(figure.exact) == "8784/125"
    wrong = figures.Figure(**{**figure.__dict__, "published": "70.273"})
    with pytest.raises(CorpusError, match=r"DeepSeek-V3 computes to 70\.272; expected 70\.273"):
        wrong.record()


def test_every_case_says_what_it_catches() -> None:
    made: list[Case] = cases()
    assert len({case.name for case in made}) == len(made)
    assert all(case.purpose and case.catches for case in made)
    assert sum(bool(case.sources) for case in made) > len(made) / 2
    assert all(source.startswith("https://github.com/") for case in made for source in case.sources)
