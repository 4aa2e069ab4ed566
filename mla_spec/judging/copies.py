"""Judging processes are copies of one that has imported torch and the laws. This module imports neither."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

from mla_spec.installed import law_modules

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(law_modules())


def begin_imports() -> None:
    """Start the process that is copied, if it does not run: it imports while this one does."""
    forkserver.ensure_running()
