"""The devices that a user names."""

from __future__ import annotations

import torch

from mla_spec.text.terminal import UsageError

EVERY_GPU = "cuda:*"


def require_device(device: str) -> None:
    """Raise UsageError, in one sentence, unless torch can use ``device``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def devices_of(text: str) -> tuple[str, ...]:
    """The devices that ``text`` names, with commas between; "cuda:*" is every GPU that torch sees.

    A device that is named twice has two workers.

    Raises:
        UsageError: torch cannot use one of them.
    """
    if text == EVERY_GPU:
        found = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        if not found:
            raise UsageError(f"device {text!r} cannot be used: torch sees no GPU")
        return found
    devices = tuple(text.split(","))
    for device in devices:
        require_device(device)
    return devices
