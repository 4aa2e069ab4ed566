"""Calls captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla_spec.judging.law import Options

Replay = Callable[[], Any]
"""Runs a captured call again, on what its tensors hold now; what it returned is overwritten and returned."""

_WARM_UPS = 2


def needs_cuda(options: Options) -> str:
    """For ``law(unavailable=...)``."""
    return "" if torch.device(options.device).type == "cuda" else "needs a CUDA device: --device cuda"


def captured(call: Callable[[], Any], device: str) -> Replay:
    """``call``, warmed up on a stream of its own as capturing demands, and then captured.

    Raises:
        RuntimeError: the call does what cannot be captured, such as waiting for the device.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = call()

    def replay() -> Any:
        with torch.cuda.device(device):
            graph.replay()
        return returned

    return replay
