"""Writes a row of ``signatures`` out as an adapter, and makes one of it: what ``--signature`` runs is what ``new`` prints."""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping
from typing import Any

from mla_spec.adapters import words
from mla_spec.adapters.signatures import SIGNATURES, KernelSignature

HEADERS = {
    "decode": """\
    def decode(self, q, kv_cache, block_table, cache_seqlens, *, head_dim_v, softmax_scale, causal):
        b, s, h, d = q.shape
        p, n = kv_cache.shape[:2]
        c, r = head_dim_v, d - head_dim_v
        t, m = b * s, p * n
""",
    "ragged_decode": """\
    def ragged_decode(
        self, q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, *, head_dim_v, softmax_scale, causal
    ):
        t, h, d = q.shape
        p, n = kv_cache.shape[:2]
        c, r = head_dim_v, d - head_dim_v
        b, m = len(cache_seqlens), p * n
""",
    "rank_decode": """\
    def rank_decode(
        self, q, kv_cache, block_table, cache_seqlens, *, head_dim_v, softmax_scale, causal, ranks, rank, interleave
    ):
        b, s, h, d = q.shape
        p, n = kv_cache.shape[:2]
        c, r = head_dim_v, d - head_dim_v
        t, m = b * s, p * n
        own = own_tokens(cache_seqlens, ranks, rank, interleave)
""",
    "prefill": """\
    def prefill(self, q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal):
        t, h, d = q.shape
""",
}

AXES: Mapping[str, Mapping[str, str]] = {
    "decode": {},
    "ragged_decode": {},
    "rank_decode": {},
    "prefill": {"b": "len(cu_seqlens_q) - 1", "s": "max(1, int(cu_seqlens_q.diff().max()))", "v": "v.shape[-1]"},
}
"""By operation, what an axis is where it is no local variable of that name."""

OUT: Mapping[str, Mapping[str, str]] = {
    "decode": {"t,h,c": "out.view(b, s, h, c)", "b,s,h,c": "out"},
    "ragged_decode": {"t,h,c": "out"},
    "rank_decode": {"t,h,c": "out.view(b, s, h, c)", "b,s,h,c": "out"},
    "prefill": {"t,h,v": "out", "b,h,s,v": "unpadded(out, cu_seqlens_q)"},
}
LSE: Mapping[str, Mapping[str, str]] = {
    "decode": {"b,h,s": "lse", "b,s,h": "lse.transpose(1, 2)", "t,h": "lse.reshape(b, s, h).transpose(1, 2)"},
    "ragged_decode": {"h,t": "lse", "t,h": "lse.T"},
    "rank_decode": {"h,t": "lse.reshape(h, b, s).transpose(0, 1)", "b,s,h": "lse.transpose(1, 2)"},
    "prefill": {"h,t": "lse"},
}
"""By operation, from the axes in which a result comes, the contract's."""

CONVENTIONS = {
    "q_latent": "q is passed in two parts: latent and rope",
    "k_pe": "the cache is passed in two parts: latent and rope",
    "new_kv": "new tokens are passed apart from the cache",
    "slot_indices": "tokens are named by a list of slots, made from the block table",
    "prefix_indices": "cached tokens are named by a list of slots, made from the block table",
    "own_seqlens": "lengths are those of the rank's own tokens, and of whole sequences apart",
    "page_indices": "pages are named by a list, made from the block table",
    "padded_q": "packed sequences are padded to the longest",
}
"""What a word means for how a kernel is called."""

_MEMORY = ("out", "lse", "scratch")


def conventions(row: KernelSignature) -> tuple[str, ...]:
    """What an adapter of the row converts or passes, in one sentence each."""
    given = [_word(value)[0] for value in (*row.plan.values(), *row.arguments.values()) if isinstance(value, str)]
    said = [CONVENTIONS[word] for word in given if word in CONVENTIONS]
    axes = _made(row).get("lse") or _returned(row).get("lse")
    if row.lse_base == "2":
        said.append("the LSE comes in base 2: converted")
    if axes is not None and LSE[row.operation][axes] != "lse":
        said.append(f"the LSE comes as [{axes}]: laid out as the contract has it")
    default = f"the default is {row.default_scale}" if row.default_scale else "there is no default"
    said.append(f"softmax_scale is passed: {default}")
    said.append(f"causal: {row.causal}")
    return tuple(said)


def adapter_source(name: str, kernel: str | None = None) -> str:
    """The adapter of the row ``name`` as the text of a module.

    Args:
        name: in ``SIGNATURES``.
        kernel: where the module imports the kernel from, "package.module:object"; None where the name ``kernel`` will be
            there already.

    Raises:
        ValueError: ``kernel`` is not of that form.
    """
    row = SIGNATURES[name]
    body = _method(row)
    helpers = [helper for helper in words.HELPERS if re.search(rf"\b{helper}\(", body)]
    said = "".join(f"\n* {sentence}" for sentence in conventions(row))
    lines = [
        f'"""A kernel with the signature {name!r}, which is that of {row.call}.\n{said}\n\nRead in: {row.source}.\n"""\n',
        "import torch\n",
        "from mla_spec import Profile, Supports",
        *((f"from mla_spec.adapters.words import {', '.join(helpers)}",) if helpers else ()),
        *(() if kernel is None else (f"\n{_import(kernel)}",)),
        "\n\nclass Adapter:",
        f"    name = {name!r}",
        f"    supports = Supports({row.supports.restrictions()})",
        *_profile(row),
        "    conventions = (",
        *(f"        {sentence!r}," for sentence in conventions(row)),
        "    )",
        f"\n{body}",
    ]
    return "\n".join(lines)


def adapter_of(name: str, kernel: Any) -> Any:
    """An adapter of ``kernel``, which has the signature ``name``.

    What the kernel itself declares as ``name``, ``supports`` and ``profile`` takes the place of what the row says.
    """
    text, file = adapter_source(name), f"<adapter of {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # for the lines of a traceback
    namespace: dict[str, Any] = {"kernel": kernel}
    exec(compile(text, file, "exec"), namespace)
    adapter = namespace["Adapter"]()
    adapter.name = getattr(kernel, "name", None) or getattr(kernel, "__name__", type(kernel).__name__)
    for declared in ("supports", "profile"):
        if hasattr(kernel, declared):
            setattr(adapter, declared, getattr(kernel, declared))
    return adapter


def unfit(name: str, kernel: Any) -> str:
    """Why ``kernel`` cannot have the signature ``name``, or ""."""
    if not SIGNATURES[name].plan:
        return "" if callable(kernel) else "it is not callable"
    missing = [method for method in ("plan", "run") if not callable(getattr(kernel, method, None))]
    return f"it has no method {' and no method '.join(missing)}" if missing else ""


def _import(kernel: str) -> str:
    module, separator, attribute = kernel.partition(":")
    if not separator or not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ValueError(f"a kernel to import is package.module:object, got {kernel!r}")
    return f"from {module} import {attribute} as kernel"


def _profile(row: KernelSignature) -> list[str]:
    if not row.arithmetic:
        return []
    options = {d: ", ".join(f"{key}={value!r}" for key, value in more.items()) for d, more in row.arithmetic.items()}
    return [
        "    profile = {",
        *(f"        {d!r}: Profile.default({d!r}, {text})," for d, text in options.items()),
        "    }",
    ]


def _method(row: KernelSignature) -> str:
    """The operation: memory, the call, and what came back as the contract has it."""
    made, returned = _made(row), _returned(row)
    lines = [f"{name} = {_memory(value, row)}" for name, value in _memories(row)]
    function = "kernel"
    if row.plan:
        lines += ["kernel.plan(", *_passed(row.plan, row, positional=False), ")"]
        function = "kernel.run"
    assigned = f"{next(iter(returned))} = " if returned else ""
    if len(returned) > 1:
        assigned = "returned = "
    lines += [f"{assigned}{function}(", *_passed(row.arguments, row, row.positional), ")"]
    if len(returned) > 1:
        names = ", ".join(returned)
        lines.append(f'{names} = parts(returned, "{names}")')
    for name, axes in returned.items():
        if name != "_":
            lines.append(f'expect_shape({name}, "{name}", "{axes}", {_tuple(axes, row)})')
    everything = made | returned
    lse = "None"
    if "lse" in everything:
        lse = LSE[row.operation][everything["lse"]]
        lse = f"natural({lse})" if row.lse_base == "2" else lse
    lines.append(f"return {OUT[row.operation][everything['out']]}, {lse}")
    return HEADERS[row.operation] + "".join(f"        {line}\n" for line in lines)


def _passed(arguments: Mapping[str, Any], row: KernelSignature, positional: bool) -> list[str]:
    return [
        f"    {_value(value, row)},  # {name}" if positional else f"    {name}={_value(value, row)},"
        for name, value in arguments.items()
    ]


def _value(value: Any, row: KernelSignature) -> str:
    if not isinstance(value, str):
        return repr(value)
    if value.startswith("'"):
        return value
    word, axes = _word(value)
    if word in _MEMORY:
        return _variable(word, value, row)
    text = words.WORDS[row.operation][word]
    return text if not axes else f"{text}.reshape{_tuple(axes, row)}"


def _memories(row: KernelSignature) -> list[tuple[str, str]]:
    """Memory among the arguments, by the names of its variables."""
    values = [value for value in row.arguments.values() if isinstance(value, str) and _word(value)[0] in _MEMORY]
    return [(_variable(_word(value)[0], value, row), value) for value in values]


def _variable(word: str, value: str, row: KernelSignature) -> str:
    """The name of the variable: a number follows where there are several of a kind."""
    alike = [other for other in row.arguments.values() if isinstance(other, str) and _word(other)[0] == word]
    return word if len(alike) == 1 else f"{word}_{alike.index(value) + 1}"


def _memory(value: str, row: KernelSignature) -> str:
    word, axes = _word(value)
    dtype = "q.dtype" if word == "out" else "torch.float32"
    return f"torch.empty({_tuple(axes, row)}, dtype={dtype}, device=q.device)"


def _made(row: KernelSignature) -> dict[str, str]:
    """Axes of the results that the call writes to."""
    return {name: _word(value)[1] for name, value in _memories(row) if name in ("out", "lse")}


def _returned(row: KernelSignature) -> dict[str, str]:
    """Axes of what is returned, by name and in order."""
    return {_word(value)[0]: _word(value)[1] for value in row.returns}


def _tuple(axes: str, row: KernelSignature) -> str:
    names = AXES[row.operation]
    each = [" + ".join(names.get(part, part) for part in axis.split("+")) for axis in axes.split(",")]
    return f"({', '.join(each)}{',' * (len(each) == 1)})"


def _word(value: str) -> tuple[str, str]:
    """(word, axes) of "word[axes]"."""
    word, _, axes = value.removesuffix("]").partition("[")
    return word, axes
