"""Each row of ``signatures`` calls an honest kernel right, and a kernel with another convention is told which one it has."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import KERNELS

from mla_spec.adapters import words
from mla_spec.adapters.signatures import SIGNATURES, KernelSignature
from mla_spec.adapters.written import adapter_of, adapter_source, conventions
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.description import describe
from mla_spec.subjects.find import resolve_subject

WITH_LSE = [name for name, row in SIGNATURES.items() if row.supports.lse]
SUFFIXES = ("agrees_with_reference", "lse_agrees_with_reference", "reads_strides")


def laws(operation: str) -> list[str]:
    return [f"test_{operation}_{suffix}" for suffix in SUFFIXES]


def records(subject: Any, names: list[str], examples: int = 6, *, minimise: bool = False) -> list[Record]:
    options = Options(examples=examples, dtypes=subject.supports.dtypes[-1:], minimise=minimise)
    return [run_law(all_laws()[name], subject, options) for name in names]


class Changed:
    """A kernel of either kind whose arguments or results are changed."""

    __name__ = "changed"

    def __init__(self, name: str, arguments: Callable[..., Any], results: Callable[..., Any]) -> None:
        self.row, self.kernel, self.arguments, self.results = SIGNATURES[name], KERNELS[name], arguments, results
        self.__module__ = KERNELS[name].__module__

    def named(self, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.row.arguments, args, strict=False)) | options

    def plan(self, **options: Any) -> None:
        self.kernel.plan(**self.arguments(self.row.plan, options))

    def run(self, **options: Any) -> Any:
        return self.results(self.row, options, self.kernel.run(**options))

    def __call__(self, *args: Any, **options: Any) -> Any:
        given = self.arguments(self.row.arguments, self.named(args, options))
        return self.results(self.row, given, self.kernel(**given))


def unchanged(_: Any, given: Any) -> Any:
    return given


def scale_of_1(parameters: Any, given: dict[str, Any]) -> dict[str, Any]:
    scale = [name for name, word in parameters.items() if word == "scale"]
    return given | dict.fromkeys(scale, 1.0)


def with_lse(
    change: Callable[[torch.Tensor], torch.Tensor], row: KernelSignature, given: dict[str, Any], returned: Any
) -> Any:
    """What the kernel returned, or wrote, with another LSE."""
    for name, word in row.arguments.items():
        if isinstance(word, str) and word.startswith("lse["):
            given[name].copy_(change(given[name]).reshape(given[name].shape))
    named = zip(row.returns, returned, strict=False) if row.returns else ()
    return tuple(change(x) if word.startswith("lse[") else x for word, x in named)


def same(row: KernelSignature, given: dict[str, Any], returned: Any) -> Any:
    return returned


def test_there_is_a_kernel_of_every_signature() -> None:
    assert set(KERNELS) == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_an_honest_kernel_conforms(name: str) -> None:
    adapter = adapter_of(name, KERNELS[name])
    got = records(adapter, laws(SIGNATURES[name].operation))
    assert got[0].verdict == got[2].verdict == "pass", "\n".join(record.text() for record in got)
    assert got[1].verdict == ("pass" if name in WITH_LSE else "unsupported"), got[1].text()


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_kernel_without_its_scale_is_told_so(name: str) -> None:
    adapter = adapter_of(name, Changed(name, scale_of_1, same))
    (record,) = records(adapter, laws(SIGNATURES[name].operation)[:1], minimise=True)  # not of large cases
    assert record.verdict == "fail", record.text()
    assert "softmax_scale is left out: it is 1" in record.message


@pytest.mark.parametrize("name", WITH_LSE)
def test_an_lse_of_the_other_base_is_told_so(name: str) -> None:
    to_base_2 = partial(with_lse, lambda lse: lse / math.log(2))
    to_base_e = partial(with_lse, lambda lse: lse * math.log(2))
    row = SIGNATURES[name]
    adapter = adapter_of(name, Changed(name, unchanged, to_base_e if row.lse_base == "2" else to_base_2))
    out, lse = records(adapter, laws(row.operation)[:2])
    assert (out.verdict, lse.verdict) == ("pass", "fail"), lse.text()
    want = (
        "the LSE is a natural logarithm, converted as one of base 2"
        if row.lse_base == "2"
        else "the LSE is a logarithm of base 2"
    )
    assert want in lse.message


@pytest.mark.parametrize("name", WITH_LSE)
def test_an_lse_with_exchanged_axes_is_told_so(name: str) -> None:
    row = SIGNATURES[name]
    adapter = adapter_of(name, Changed(name, unchanged, partial(with_lse, lambda lse: lse.transpose(-1, -2))))
    (record,) = records(adapter, laws(row.operation)[1:2])
    assert record.verdict == "fail", record.text()
    told = ("the same axes in another order", "is laid out")
    assert any(sentence in record.message for sentence in told), record.text()


def test_conventions_are_reported() -> None:
    text = describe(adapter_of("flashinfer-mla", KERNELS["flashinfer-mla"])).text
    assert "the LSE comes in base 2: converted" in text
    assert "pages are named by a list, made from the block table" in text
    assert "the cache is passed in two parts: latent and rope" in text
    assert all(conventions(row) for row in SIGNATURES.values())


def test_every_word_and_helper_is_used() -> None:
    texts = "".join(adapter_source(name) for name in SIGNATURES)
    assert [helper for helper in words.HELPERS if f"{helper}(" not in texts] == []
    given = [word for row in SIGNATURES.values() for word in (*row.arguments.values(), *row.plan.values())]
    said = {word.partition("[")[0] for word in given if isinstance(word, str)}
    assert [word for known in words.WORDS.values() for word in known if word not in said] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_written_adapter_gives_the_same_verdicts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As text in a file of its own, of an honest kernel and of one with another scale."""
    module = "of_" + name.replace("-", "_")
    lines = "from kernels import KERNELS\nfrom test_signatures import Changed, same, scale_of_1\n"
    kernels = f"honest = KERNELS[{name!r}]\nwrong = Changed({name!r}, scale_of_1, same)\n"
    (tmp_path / f"{module}.py").write_text(lines + kernels)
    monkeypatch.syspath_prepend(str(tmp_path))
    for kernel in ("honest", "wrong"):
        path = tmp_path / f"{kernel}.py"
        path.write_text(adapter_source(name, f"{module}:{kernel}"))
        written = resolve_subject(f"{path}:Adapter")
        read = resolve_subject(f"{module}:{kernel}", name)
        law = laws(SIGNATURES[name].operation)[:1]
        (a,), (b,) = records(written, law, 2), records(read, law, 2)
        assert (a.verdict, a.case, a.message, a.worst) == (b.verdict, b.case, b.message, b.worst)
        assert a.verdict == ("pass" if kernel == "honest" else "fail")
        sys.modules.pop(path.stem, None)


def parameters(path: str) -> list[str]:
    """Names of the parameters of an installed function, or of the methods plan and run."""
    module, _, attribute = path.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if found is torch.nn.functional.scaled_dot_product_attention:
        return [a.name for a in torch.ops.aten.scaled_dot_product_attention.default._schema.arguments]
    functions = [found.plan, found.run] if inspect.isclass(found) else [found]
    return [name for function in functions for name in inspect.signature(function).parameters]


def read_parameters(path: str) -> list[str]:
    """The same of a function whose package cannot be imported here, read in its file."""
    module, _, attribute = path.partition(":")
    package, *inside = module.split(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]).joinpath(*inside).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == attribute)
    return [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_are_those_of_the_installed_package(name: str) -> None:
    row = SIGNATURES[name]
    package = row.call.partition(":")[0].partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    try:
        known = parameters(row.call)
    except ImportError:
        known = read_parameters(row.call)
    assert [given for given in (*row.plan, *row.arguments) if given not in known] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "flash-mlaa"], "unknown signature 'flash-mlaa'; did you mean flash-mla"),
        (["new", "flash-mla", "--kernel", "my kernel"], "package.module:object, got 'my kernel'"),
        (["check", "kernels:KERNELS", "--signature", "flash-mla"], "'flash-mla': it is not callable"),
        (["check", "kernels:flash_mla", "--signature", "flashinfer-mla"], "no method plan and no method run"),
        (["check", "kernels:flash_mla", "--signature", "flashmla"], "unknown operation 'flashmla'"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*arguments, *(["--in-process"] if arguments[0] == "check" else [])])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_signatures_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["signatures"]) == 0
    out = capsys.readouterr().out
    for name, row in SIGNATURES.items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert row.source in line


def test_a_signature_is_checked_in_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    law = "test_decode_agrees_with_reference"
    options = ["--law", law, "--examples", "3", "--seed", "0", "--in-process"]
    assert main(["check", "kernels:vllm_triton", "--signature", "vllm-triton", *options]) == 0
    assert "softmax_scale is passed: there is no default" in capsys.readouterr().out


def test_what_a_kernel_declares_takes_the_place_of_its_row() -> None:
    def narrower(*args: Any, **options: Any) -> Any:
        return KERNELS["vllm-triton"](*args, **options)

    narrower.supports = SIGNATURES["vllm-cutlass"].supports  # type: ignore[attr-defined]
    assert adapter_of("vllm-triton", narrower).supports.page_sizes == (128,)
