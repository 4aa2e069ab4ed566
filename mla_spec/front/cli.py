"""The command ``mla-spec``. Exit codes: 0 conforms, 1 violates, 2 usage, 3 incomplete."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mla_spec import __version__
from mla_spec.front.arguments import COMMANDS
from mla_spec.front.help import add_examples
from mla_spec.front.limits import require_outputs, require_within_limits
from mla_spec.subjects.exits import INCOMPLETE, loud_exits
from mla_spec.subjects.violation import SuiteFailed
from mla_spec.text.terminal import UsageError, any_encoding, one_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    any_encoding()
    try:
        parser = _parser()
        _complete(parser)
        options = parser.parse_args(arguments)
        require_within_limits(vars(options))
        require_outputs(vars(options))
        code = _run(options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"mla-spec: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mla-spec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print("mla-spec: the report cannot be written: no space is left", file=sys.stderr)
        return INCOMPLETE


def _run(options: argparse.Namespace) -> int:
    """Run what was parsed; a subject that asks to end the process ends it as incomplete."""
    run: Any = options.run
    # Before numpy is imported: cases are so small that BLAS threads only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        with loud_exits():
            return int(run(options))
    except SuiteFailed as error:
        print(f"mla-spec: the suite itself failed, not the subject: {error}", file=sys.stderr)
        return INCOMPLETE
    except SystemExit as error:
        print(f"mla-spec: SystemExit: {error} was raised before there was a report", file=sys.stderr)
        return INCOMPLETE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mla-spec",
        description="Conformance suite for Multi-head Latent Attention.",
        epilog="`mla-spec COMMAND --help` has the options, examples and exit codes of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mla-spec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for add in COMMANDS:
        add(commands)
    add_examples(commands.choices)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that completes a line, and exit; nothing otherwise."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


if __name__ == "__main__":
    sys.exit(main())
