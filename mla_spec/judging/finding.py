"""What is found out of a fault by asking a subject again: a sentence, and which part of the computation it is about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

TOPICS: Final[dict[str, str]] = {
    "reads": "which key, page, table row or sequence is read",
    "mask": "which keys a query sees",
    "scores": "products of queries and keys, and their scale",
    "softmax": "weights, their sum, and how parts are joined",
    "lse": "the LSE",
    "values": "what the weights multiply",
    "heads": "which head is which",
    "rotation": "pairs, angles, positions and factors of rope",
    "norm": "the norms of latents",
    "queries": "the way to the queries of a layer",
    "latent": "the way to what a layer caches",
    "output": "the way from attention to a layer's output",
    "cache": "what a layer keeps from call to call",
    "batch": "how sequences of a call are told apart",
    "gradient": "the backward pass",
    "strides": "where elements lie in memory",
    "memory": "what is written, shared or never written",
    "state": "what is kept from an earlier call",
    "bytes": "how much memory a cache takes",
    "rounding": "in which format, and in which order, sums are formed",
    "size": "a number of heads, keys, rows or sequences beyond which something changes",
}
"""Parts of a computation that a fault may be in, each as a clause."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found out.

    Attributes:
        topic: one of ``TOPICS``.
        says: a clause or a sentence.
    """

    topic: str
    says: str

    def __post_init__(self) -> None:
        assert self.topic in TOPICS, self.topic

    def as_dict(self) -> dict[str, str]:
        return asdict(self)
