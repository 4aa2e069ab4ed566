"""The commands ``mla-spec signatures`` and ``mla-spec new``."""

from __future__ import annotations

import difflib

from mla_spec.adapters.signatures import SIGNATURES
from mla_spec.adapters.written import adapter_source
from mla_spec.text.table import format_table
from mla_spec.text.terminal import UsageError


def signatures() -> str:
    """Every signature: its name, the operation that it implements, the kernel that has it, and where that was read."""
    header = ("signature", "operation", "kernel", "read in")
    rows = [(name, row.operation, row.call, row.source) for name, row in SIGNATURES.items()]
    use = "mla-spec check my_kernels:fn --signature NAME\nmla-spec new NAME > my_adapter.py writes the adapter out"
    return f"{format_table([header, *rows])}\n\n{use}"


def new(name: str, kernel: str | None) -> str:
    """An adapter as text, of ``kernel`` or of the public kernel itself.

    Raises:
        UsageError: no signature has the name, or the kernel's name is of another form than package.module:object.
    """
    if name not in SIGNATURES:
        close = difflib.get_close_matches(name, SIGNATURES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(SIGNATURES)}"
        raise UsageError(f"unknown signature {name!r}; {hint}")
    try:
        return adapter_source(name, kernel or SIGNATURES[name].call)
    except ValueError as error:
        raise UsageError(str(error)) from error
