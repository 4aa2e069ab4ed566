"""The command ``mla-spec report``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from mla_spec.front.reports.account import Document, read_document
from mla_spec.front.reports.github import github
from mla_spec.front.reports.html import html
from mla_spec.front.reports.junit import junit
from mla_spec.front.reports.markdown import markdown
from mla_spec.text.terminal import write_text

FORMATS: Mapping[str, Callable[[Document], str]] = {
    "markdown": markdown,
    "html": html,
    "junit": junit,
    "github": github,
}


def report(options: argparse.Namespace) -> int:
    """Write the report of a run from its records."""
    write_text(options.output, FORMATS[options.format](read_document(options.files)))
    return 0
