"""Calls as bytes: what they hold comes back, equal calls are equal bytes, and damage is told in one sentence."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mla_spec.bounds.profile import Profile
from mla_spec.exchange.call import OBJECTS, Call, address, call_of, read_call
from mla_spec.exchange.contents import read_answer
from mla_spec.exchange.folder import INDEX, CallLine, Folder, HeaderLine
from mla_spec.exchange.tensor_file import DTYPES, ExchangeError, decode, encode
from mla_spec.operations.all import CALLED
from mla_spec.operations.operation import Operation
from mla_spec.properties.cases import CASES
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import SubjectCrashed, Unsupported

COUNT = int(os.environ.get("MLA_SPEC_FUZZ", "200"))
SLOWEST = 60
"""Seconds that one damaged file may take, on a machine that does other things too."""


class Nothing:
    """A subject that keeps what it is asked."""

    supports = Supports()

    def __init__(self, operation: Operation) -> None:
        setattr(self, operation.name, self._keep)

    def _keep(self, *places: Any, **options: Any) -> Any:
        self.places, self.options = places, options
        raise KeyboardInterrupt


def asked(operation: Operation) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an ordinary call."""
    case = CASES[operation.name].ordinary(Supports(), Profile.default("bfloat16"))[0]
    subject, inputs = Nothing(operation), operation.build(case)
    driver = Driver(subject, "bfloat16")
    with pytest.raises(KeyboardInterrupt):
        driver.raw(operation, inputs, driver.tensors(operation, inputs))
    return subject.places, subject.options


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().flatten().view(torch.uint8).equal(
            b.contiguous().flatten().view(torch.uint8)
        )  # fmt: skip
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("operation", CALLED, ids=lambda operation: operation.name)
def test_a_call_comes_back_as_it_was(operation: Operation) -> None:
    places, options = asked(operation)
    data = call_of(operation, places, options).encoded()
    read = read_call(data, "call")
    got_places, got_options = read.arguments()
    assert len(got_places) == len(places)
    assert all(same(a, b) for a, b in zip(got_places, places, strict=True))
    assert same(got_options, options)
    assert address(read.encoded()) == address(data)


def test_every_object_of_a_call_can_be_made() -> None:
    kinds = {(o.name, name) for o in CALLED for name in o.keywords if name in ("rope", "config")}
    kinds |= {(o.name, a.name) for o in CALLED for a in o.arguments if a.kind == "config"}
    assert kinds == set(OBJECTS)


@pytest.mark.parametrize("name", DTYPES)
def test_elements_are_those_of_the_library(name: str) -> None:
    x = torch.arange(24, dtype=torch.uint8).remainder(2 if name == "BOOL" else 24).view(DTYPES[name]).reshape(1, -1)
    data = encode({"x": x, "empty": x[:0]}, {"b": "2", "a": "1"})
    theirs = safetensors.torch.load(data)
    mine, texts = decode(data, "file")
    assert all(same(each["x"], x) and each["empty"].shape == (0, x.shape[1]) for each in (theirs, mine))
    assert texts == {"a": "1", "b": "2"}


def test_four_bits_are_read_as_bytes() -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}).encode()
    tensors, texts = decode(len(header).to_bytes(8, "little") + header + bytes([1, 2, 3, 254]), "file")
    assert same(tensors["x"], torch.tensor([[1, 2], [3, 254]], dtype=torch.uint8))
    assert texts == {}


def test_contents_are_aligned_and_equal_calls_are_equal_bytes() -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(1)}
    data = encode(tensors, {"y": "1", "x": "2"})
    assert data == encode(dict(reversed(tensors.items())), {"x": "2", "y": "1"})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name, x in tensors.items():
        assert header[name]["data_offsets"][0] % x.element_size() == 0


def test_strides_are_told_and_contents_are_dense() -> None:
    (operation,) = [o for o in CALLED if o.name == "merge"]
    outs, lses = torch.randn(2, 3, 4, 5).transpose(0, 2), torch.randn(4, 2, 3)
    call = read_call(call_of(operation, (outs, lses), {}).encoded(), "call")
    assert call.strides == {"outs": outs.stride()}
    assert call.tensors["outs"].is_contiguous()
    assert same(call.tensors["outs"], outs)


def test_numbers_of_other_kinds_are_numbers() -> None:
    (operation,) = [o for o in CALLED if o.name == "decode"]
    places, options = asked(operation)
    odd = {**options, "softmax_scale": torch.tensor(0.25), "head_dim_v": np.int64(options["head_dim_v"])}
    read = read_call(call_of(operation, places, odd).encoded(), "call")
    assert same(read.arguments()[1], {**options, "softmax_scale": 0.25})


def test_inputs_are_numbers_and_an_empty_row_has_one_name() -> None:
    (operation,) = [o for o in CALLED if o.name == "merge"]
    lses = torch.tensor([[[torch.inf, 1.0]], [[-torch.inf, 2.0]]])
    inputs = call_of(operation, (torch.ones(2, 2, 1, 3).bfloat16(), lses), {}).inputs()
    assert inputs.outs.dtype == np.float64
    assert inputs.lses.tolist() == [[[-np.inf, 1.0]], [[-np.inf, 2.0]]]


def an_ordinary_call() -> Call:
    (operation,) = [o for o in CALLED if o.name == "rope"]
    return call_of(operation, *asked(operation))


def damaged(data: bytes, drawn: random.Random) -> bytes:
    """A file of which bytes are cut, doubled, changed or added; most of them in its header."""
    changed = bytearray(data)
    head = 8 + int.from_bytes(data[:8], "little")
    for _ in range(drawn.choice((1, 1, 2, 4))):
        at = drawn.randrange(drawn.choice((8, head, len(changed) or 1)) or 1) % (len(changed) or 1)
        end = at + drawn.choice((1, 1, 2, 9))
        odd = drawn.choice(
            (b"", b"\xff" * 9, b"0", b"-1", b"[", b'"', b"{}", b"99999999999999999999", bytes(changed[at:end]) * 2)
        )
        changed[at:end] = odd
    return bytes(changed)


def told(read: Callable[[], Any]) -> bool:
    """Whether something is refused; AssertionError unless that takes one sentence."""
    try:
        read()
    except ExchangeError as error:
        sentence = str(error)
    else:
        return False
    assert sentence
    assert "\n" not in sentence
    return True


def test_a_damaged_call_is_one_sentence_or_another_call() -> None:
    data, drawn, refused = an_ordinary_call().encoded(), random.Random(0), 0
    for _ in range(COUNT):
        start, spoiled = time.monotonic(), damaged(data, drawn)
        refused += told(lambda spoiled=spoiled: read_call(spoiled, "call").arguments())
        assert time.monotonic() - start < SLOWEST
    assert refused > COUNT / 2


def test_a_damaged_answer_is_one_sentence_or_another_answer() -> None:
    data, drawn, refused = encode({"out": torch.ones(3, 5), "lse": torch.ones(3)}, {}), random.Random(0), 0
    for _ in range(COUNT):
        try:
            read_answer(damaged(data, drawn), "answer")
        except (SubjectCrashed, Unsupported) as error:
            refused += "\n" not in str(error)
    assert refused > COUNT / 2


HEADER = HeaderLine(suite="0", seed=0, examples=1, laws=("rope",), dtypes=None, subject={"operations": ["rope"]})


def test_a_damaged_index_is_one_sentence_or_another_index(tmp_path: Path) -> None:
    folder = Folder.made(str(tmp_path / "calls"), HEADER)
    folder.note(CallLine(call="0" * 64, operation="rope", law="a law", case="rope:", bytes=1))
    path = tmp_path / "calls" / INDEX
    data, drawn, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(COUNT):
        path.write_bytes(damaged(data, drawn))
        refused += told(lambda: Folder.opened(str(tmp_path / "calls")))
    assert refused > COUNT / 4


def test_an_index_is_read_while_it_is_written(tmp_path: Path) -> None:
    folder = Folder.made(str(tmp_path / "calls"), HEADER)
    call = an_ordinary_call()
    assert folder.add(call, "a law", "a case", 2**20) == len(call.encoded())
    assert folder.add(call, "another law", "a case", 2**20) == 0
    with (tmp_path / "calls" / INDEX).open("a") as file:
        file.write('{"type": "call", "call": "12')
    assert Folder.opened(str(tmp_path / "calls")).known == {address(call.encoded())}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"schema": "mla-spec-call", "version": "2"}, "this version reads 'mla-spec-call' version '1'"),
        ({"operation": "layer"}, "the operation is 'layer', which takes no tensors or is unknown"),
        ({"rope.dim": "3"}, "must be even, got 3"),
        ({"rope.dim.x": "3"}, "which has no fields"),
        ({"rope.color": "red"}, "has the unknown field 'color'"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(texts: dict[str, str], says: str) -> None:
    call = an_ordinary_call()
    tensors, whole = decode(call.encoded(), "call")
    with pytest.raises(ExchangeError, match=says):
        read_call(encode(tensors, whole | texts), "call").arguments()


def test_a_missing_argument_is_said() -> None:
    tensors, texts = decode(an_ordinary_call().encoded(), "call")
    with pytest.raises(ExchangeError, match="rope has no argument positions"):
        read_call(encode({"x": tensors["x"]}, texts), "call")
