"""The arguments of commands: lists, contracts, models and golden files."""

from __future__ import annotations

from mla_spec.front import commands
from mla_spec.front.arguments.parsers import Parsers


def add_laws(parsers: Parsers) -> None:
    parser = parsers.add_parser("laws", help="list the laws")
    parser.add_argument("--quick", action="store_true", help="only those of a quick check")
    parser.set_defaults(run=commands.run_laws)


def add_contract(parsers: Parsers) -> None:
    parser = parsers.add_parser("contract", help="print how an operation is called, and what it must give")
    parser.set_defaults(run=commands.run_contract)
    parser.add_argument("operation", nargs="?", metavar="OPERATION", help="default: the calls of all")


def add_adapters(parsers: Parsers) -> None:
    parser = parsers.add_parser(
        "adapters", help="list the adapters that ship: version, whether they run here, operations"
    )
    parser.set_defaults(run=commands.run_adapters)


def add_signatures(parsers: Parsers) -> None:
    parser = parsers.add_parser("signatures", help="list the public kernels whose signature --signature takes")
    parser.set_defaults(run=commands.run_signatures)


def add_new(parsers: Parsers) -> None:
    parser = parsers.add_parser("new", help="write an adapter of a public kernel's signature, to be changed")
    parser.set_defaults(run=commands.run_new)
    parser.add_argument("signature", metavar="SIGNATURE", help="as `mla-spec signatures` lists it")
    parser.add_argument(
        "--kernel", metavar="OBJECT", help="package.module:object that it calls (default: the public kernel)"
    )


def add_models(parsers: Parsers) -> None:
    parser = parsers.add_parser("models", help="list the published MLA models")
    parser.set_defaults(run=commands.run_models)


def add_cache(parsers: Parsers) -> None:
    parser = parsers.add_parser("cache", help="exact cache sizes of a published model, or of a configuration file")
    parser.set_defaults(run=commands.run_cache)
    parser.add_argument("model", metavar="MODEL", help="a name of `mla-spec models`, a config.json, or its folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the cache (bfloat16)")
    parser.add_argument("--tokens", type=int, default=1, metavar="N", help="tokens per sequence (1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--page-size", type=int, default=1, metavar="N", help="tokens per page (1)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks of tensor parallelism (1)")
    parser.add_argument("--layout", metavar="NAME", help="also in this quantised layout, e.g. fp8_ds_mla")
    parser.add_argument("--training", action="store_true", help="what a training step keeps of activations instead")


def add_embed(parsers: Parsers) -> None:
    parser = parsers.add_parser("embed", help="an existing model's MHA, GQA or MQA with rotary embedding as exact MLA")
    parser.set_defaults(run=commands.run_embed)
    parser.add_argument("config", metavar="CONFIG", help="a config.json with transformers' names, or its folder")


def add_golden(parsers: Parsers) -> None:
    parser = parsers.add_parser(
        "golden",
        help="verify or regenerate the golden files, check a subject by them, or certify the reference in ball arithmetic",
    )
    parser.set_defaults(run=commands.run_golden)
    parser.add_argument("action", choices=("verify", "regenerate", "check", "certify"))
    parser.add_argument("subject", nargs="?", metavar="SUBJECT", help="to check, as for `mla-spec check`")
    parser.add_argument("--device", default="cpu", help="torch device of a check (cpu)")
    parser.add_argument("--json", metavar="FILE", help="also write the records of a check to FILE")
    parser.add_argument("--dir", metavar="DIR", help="the corpus to verify or regenerate (default: the installed one)")
    parser.add_argument("--calls", metavar="DIR", help="regenerate a corpus of one's own from these recorded calls")
    parser.add_argument("--cases", type=int, default=240, metavar="N", help="cases to certify (240)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases to certify (0)")


def add_book(parsers: Parsers) -> None:
    parser = parsers.add_parser(
        "book", help="write a page for each operation: its contract, its laws, the bugs they find"
    )
    parser.set_defaults(run=commands.run_book)
    parser.add_argument("folder", metavar="DIR", help="where the pages go; it is made if need be")
