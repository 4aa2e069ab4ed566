"""The command ``mla-spec statement``."""

from __future__ import annotations

import argparse

from mla_spec.front.reports.account import read_document
from mla_spec.front.reports.markdown import statement
from mla_spec.front.reports.statement import badge
from mla_spec.text.terminal import write_text


def state(options: argparse.Namespace) -> int:
    """Write the statement of conformance of a run, and its badge; the exit code is that of the run."""
    document = read_document(options.files)
    write_text(options.output, statement(document))
    if options.badge is not None:
        write_text(options.badge, badge(document))
    return document.exit_code
