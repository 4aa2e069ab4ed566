"""Memory is counted once, in whole, and for as long as anything keeps it."""

from __future__ import annotations

import torch

from mla_spec.subjects.allocation import Allocations, PeakAllocations


def test_memory_counts_once_and_until_the_last_view_is_gone() -> None:
    with Allocations() as memory:
        whole = torch.zeros(10, 8)
        row, again = whole[3], whole.view(80)
    assert memory.live == 320
    del whole, again
    assert memory.live == 320  # a row keeps all of it
    del row
    assert memory.live == 0


def test_what_existed_before_does_not_count() -> None:
    pool = torch.zeros(1000)
    with Allocations() as memory:
        pool[:10].copy_(torch.ones(10))
        view = pool[10:20]
        pool.add_(1)
    assert memory.live == 0
    assert view.sum() == 10


def test_what_grows_in_place_counts() -> None:
    with Allocations() as memory:
        x = torch.zeros(4)
        x.resize_(40)
    assert memory.live == 160


def test_what_is_hidden_counts() -> None:
    kept: dict[str, object] = {}

    def hide() -> None:
        x = torch.ones(5) * 2
        kept["closure"] = lambda: x

    with Allocations() as memory:
        hide()
    assert memory.live == 20
    kept.clear()
    assert memory.live == 0


def test_cycles_are_collected_before_memory_is_too_much() -> None:
    with Allocations() as memory:
        node: list[object] = [torch.ones(6)]
        node.append(node)
    del node
    assert not memory.exceeds(23)


def test_lengths_addresses_and_masks_do_not_count() -> None:
    with Allocations() as memory:
        kept = [torch.zeros(7, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.bool)]
    assert memory.live == 0
    with memory:
        kept += [torch.zeros(7, dtype=dtype) for dtype in (torch.uint8, torch.bfloat16, torch.float8_e4m3fn)]
    assert memory.live == 7 + 14 + 7


def test_the_peak_counts_what_is_gone_by_the_end() -> None:
    with PeakAllocations() as memory:
        x = torch.ones(100)
        x = x + 1
        x = x[:10].clone()
    assert memory.peak == 800
    assert memory.live == 40
