"""Lines of a JSON Lines file, each a dataclass that its ``type`` names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mla_spec.text.terminal import shown
from mla_spec.text.typed import Mistyped, read_object


@dataclass(frozen=True)
class LineSchema:
    """What the lines of a file may be.

    Attributes:
        name, version: what the head says in its fields ``schema`` and ``version``.
        head: the ``type`` of a line that says them.
        kinds: by ``type``, what a line becomes.
    """

    name: str
    version: int
    head: str
    kinds: Mapping[str, type[Any]]

    def read(self, raw: bytes, where: str) -> Any:
        """The line; ``where`` begins every error.

        Raises:
            Mistyped: it is no JSON object in UTF-8, of an unknown type or version, or has wrong fields.
        """
        try:
            content = json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise Mistyped(
                f"{where}: not a JSON object in UTF-8; expected one of type {', '.join(self.kinds)}"
            ) from error
        kind = content.get("type") if isinstance(content, dict) else None
        if not isinstance(kind, str) or kind not in self.kinds:
            raise Mistyped(f"{where}: type is {shown(kind)}; expected one of {', '.join(self.kinds)}")
        if kind == self.head and (content.get("schema"), content.get("version")) != (self.name, self.version):
            found = f"{shown(content.get('schema'))} version {shown(content.get('version'))}"
            raise Mistyped(f"{where}: the schema is {found}; this version reads {self.name!r} version {self.version}")
        try:
            return read_object(self.kinds[kind], content, where)
        except Mistyped as error:
            text = str(error)
            raise Mistyped(text if text.startswith(where) else f"{where}: {text}") from error
