"""The device that a user names."""

from __future__ import annotations

import torch

from mla_spec.text.terminal import UsageError


def require_device(device: str) -> None:
    """Raise UsageError, in one sentence, unless torch can use ``device``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
