"""What a subject declares is held against the types of the fields, in one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.front.cli import main
from mla_spec.subjects.supports import Supports

MISTYPED: list[tuple[dict[str, Any], str]] = [
    ({"dtypes": "float32"}, "dtypes is 'float32'; expected a list, each a string"),
    ({"dtypes": (torch.float32,)}, "dtypes[0] is torch.float32; expected a string"),
    ({"dtypes": None}, "dtypes is None; expected a list, each a string"),
    ({"page_sizes": 64}, "page_sizes is 64; expected a list, each an integer of at least 0, or None"),
    ({"page_sizes": (64.0,)}, "page_sizes[0] is 64.0; expected an integer of at least 0"),
    ({"num_heads": ("16",)}, "num_heads[0] is '16'; expected an integer of at least 0"),
    ({"num_heads": (True,)}, "num_heads[0] is True; expected an integer of at least 0"),
    ({"latent_dims": (512, 64)}, "latent_dims[0] is 512; expected a list of 2: an integer"),
    ({"latent_dims": ((512,),)}, "latent_dims[0] is (512,); expected a list of 2: an integer"),
    ({"latent_dims": ((512, -64),)}, "latent_dims[0][1] is -64; expected an integer of at least 0"),
    ({"max_s": "1"}, "max_s is '1'; expected an integer of at least 1, or None"),
    ({"max_s": 0}, "max_s is 0; expected an integer of at least 1, or None"),
    ({"topk_multiple": 0}, "topk_multiple is 0; expected an integer of at least 1"),
    ({"lse": "yes"}, "lse is 'yes'; expected True or False"),
    ({"lse": None}, "lse is None; expected True or False"),
    ({"causal": True}, "causal is True; expected a list, each True or False"),
    ({"backward": True}, "backward is True; expected a list, each a string, or None"),
    ({"latent_norm_eps": float("nan")}, "latent_norm_eps is nan; expected a finite number of at least 0, or None"),
    ({"latent_norm_eps": (1e-6,)}, "latent_norm_eps is (1e-06,); expected a finite number of at least 0, or None"),
    ({"empty_row": None}, "empty_row is None; expected one of 'zero/-inf', 'zero/+inf', 'unsupported'"),
    ({"indexer_ties": ["any"]}, "indexer_ties is ['any']; expected one of 'smaller index', 'any'"),
    ({"layer_weights": torch.zeros(2)}, "layer_weights is tensor([0., 0.]); expected one of 'live', 'copied'"),
]


@pytest.mark.parametrize(("fields", "message"), MISTYPED, ids=lambda value: str(value)[:30])
def test_a_mistyped_field_is_named_with_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'Supports: {message}')}"):
        Supports(**fields)


def test_lists_and_numbers_of_numpy_will_do() -> None:
    supports = Supports(dtypes=["float32"], num_heads=[np.int64(16)], latent_dims=[[512, 64]])  # type: ignore[arg-type]
    assert (supports.dtypes, supports.num_heads, supports.latent_dims) == (("float32",), (16,), ((512, 64),))
    assert supports.num_heads is not None
    assert type(supports.num_heads[0]) is int


DECLARATIONS = {
    "supports = dict(dtypes=['float32'])": "supports must be a Supports, got dict",
    "supports = Supports": "supports must be a Supports, got type",
    "supports = 3": "supports must be a Supports, got int",
    "supports = Supports(max_s='1')": "Supports: max_s is '1'",
    "profile = Profile.default('float32')": "profile must map dtype names to Profiles, got Profile",
    "profile = {torch.bfloat16: Profile.default('bfloat16')}": "profile has the key torch.bfloat16; expected some of float64",
    "profile = {'bf16': Profile.default('bfloat16')}": "profile has the key 'bf16'; expected some of float64",
    "profile = {None: 1}": "profile has the key None; expected some of float64",
    "profile = {'float32': {}}": "profile['float32'] must be a Profile of dtype 'float32', got {}",
    "profile = {'float32': Profile.default('float16')}": "must be a Profile of dtype 'float32', got Profile(dtype='float16'",
    "profile = [Profile.default('float32')]": "profile must map dtype names to Profiles, got list",
    "profile = {'float32': Profile.default('float32', tile='64')}": "Profile: tile is '64'; expected an integer",
}


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_a_wrong_declaration_is_a_usage_error(
    declaration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernel.py"
    file.write_text(
        "import torch\nfrom mla_spec import Profile, Supports\n\n"
        f"class K:\n    {declaration}\n    def absorb(self, *a, **k):\n        return None\n"
    )
    assert main(["check", f"{file}:K", "--law", "absorb", "--in-process"]) == 2
    err = capsys.readouterr().err
    assert DECLARATIONS[declaration] in err
    assert err.count("\n") == 1
