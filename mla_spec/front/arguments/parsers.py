"""What commands are added to."""

from __future__ import annotations

from typing import Any

Parsers = Any
"""What ``add_subparsers`` returns; argparse keeps its class to itself."""
