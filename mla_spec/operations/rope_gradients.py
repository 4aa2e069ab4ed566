"""Gradients through ``rope``, as autograd gives them.

They are judged where ``supports.backward`` names the operation, or names none and the output requires a gradient. x gets one
of its shape and dtype, for any gradient of out, whatever its strides. A backward pass changes neither arguments nor outputs,
nor the gradient that arrives, which another branch of the network may get too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mla_spec.operations.gradients import BackwardDriver, Branched, Tensors, leaves
from mla_spec.operations.operation import View
from mla_spec.operations.rope import OPERATION as ROPE
from mla_spec.operations.rope import RopeCase, RopeInputs
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Driver, Result
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, transposed, viewed


@dataclass(frozen=True)
class RopeBackwardInputs:
    """Arguments of ``rope``, and the gradient of its output."""

    forward: RopeInputs
    out_grad: Array  # of the shape of x, numbers of the dtype


@dataclass(frozen=True, kw_only=True)
class RopeBackwardCase(RopeCase):
    """As ``RopeCase``; gradients are normal numbers."""

    kind = "rope_backward"

    def with_gradients(self) -> RopeBackwardInputs:
        """The inputs, and the gradient that arrives."""
        forward = self.build()
        rng = np.random.default_rng([self.seed, 12])
        return RopeBackwardInputs(forward, round_to(rng.standard_normal(forward.x.shape), self.dtype))


OUT_GRAD_VIEWS: dict[str, View] = {
    "out_grad as a slice of a wider row": viewed(slice_of_wider, "out_grad", -1, ROW_PADDING),
    "out_grad with its first axes exchanged in memory": viewed(transposed, "out_grad", 0, 1),
    "out_grad with its last axes exchanged in memory": viewed(transposed, "out_grad", -2, -1),
}
"""Ways to pass the same gradient of out to a backward pass."""


class RopeGradientDriver:
    """A driver's subject, whose ``rope`` autograd records."""

    def __init__(self, driver: Driver) -> None:
        self.driver = BackwardDriver.of(driver)

    def tensors(self, inputs: RopeBackwardInputs) -> Tensors:
        """The arguments by name, and "out_grad"."""
        return self.driver.tensors(ROPE, inputs.forward) | {"out_grad": self.driver.tensor(inputs.out_grad)}

    def gradients(self, calls: Sequence[tuple[RopeBackwardInputs, Tensors]]) -> list[Result]:
        """The gradient of each call's x, all calls made before the first backward pass."""
        recorded = [(leaves(tensors, ("x",)), inputs.forward) for inputs, tensors in calls]
        outs = [self.driver.raw(ROPE, forward, tensors)[0] for tensors, forward in recorded]
        return [
            self.driver.gradients("rope", tensors, ("x",), out, None)["x"]
            for (tensors, _), out in zip(recorded, outs, strict=True)
        ]

    def beside_a_branch(self, inputs: RopeBackwardInputs, tensors: Tensors) -> Branched:
        """The gradient of x where another branch is added to out."""
        return self.driver.beside_a_branch(ROPE, inputs.forward, tensors, ("x",))
