"""Operations of a subject compiled by ``torch.compile``."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch

from mla_spec.judging.law import Options, Run
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import there


@cache
def compiler_missing(backend: str, device: str) -> str:
    """Why ``torch.compile`` cannot be used with this backend on this device, or ""."""
    try:
        torch.compile(torch.neg, backend=backend)(torch.zeros(2, device=device))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return f"torch.compile does not work here with backend {backend!r}: {type(error).__name__}: {first}"
    return ""


def needs_compiler(options: Options) -> str:
    """For ``law(unavailable=...)``: compiling takes seconds a case, so it is done only when asked for."""
    if options.compile is None:
        return "not asked for: --compile BACKEND, e.g. inductor"
    return compiler_missing(options.compile, options.device)


def compiled(run: Run, operation: str) -> Driver:
    """A driver of the subject with ``operation`` alone, compiled; nothing compiled before is used again."""
    driver: Driver = there(_compiled, run.driver, operation, run.compile)
    return driver


def _compiled(driver: Driver, operation: str, backend: str) -> Driver:
    torch.compiler.reset()
    function = torch.compile(getattr(driver.subject, operation), backend=backend)
    subject = SimpleNamespace(supports=driver.supports, **{operation: function})
    return Driver(subject, driver.dtype, driver.device)
