"""scripts/export_model.py: writes a trained model for other programs, and verifies it by loading it back.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import Parser
from sft_recipe.cli.sizes import size
from sft_recipe.errors import ConfigError, run_command, silence_libraries
from sft_recipe.files import user_path
from sft_recipe.language import plural

if TYPE_CHECKING:
    from sft_recipe.export.exporter import Export

USAGE = "scripts/export_model.py RUN --out DIR [FLAGS]   or   --adapter DIR --model BASE --out DIR [FLAGS]"
DESCRIPTION = """\
Writes a trained model into a new folder, with tokenizer, generation config and model card, loads it back, and
compares what it computes with the trained checkpoint. Needs no GPU; only --push_to_hub contacts a network."""


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    options = _parser().parse_args(args)
    if not options.out:
        raise ConfigError("--out needs a value")
    if (options.run is None) == (options.adapter is None):
        raise ConfigError("name what to export: RUN (a run, checkpoint or model folder) or --adapter DIR, one of them")
    if options.quant and options.format != "gguf":
        raise ConfigError(f"--quant {options.quant} is for --format gguf; for the others there is --dtype")
    return options


def _parser() -> Parser:
    parser = Parser(USAGE, DESCRIPTION)
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="run folder (its checkpoints/best, else its newest checkpoint), checkpoint, or Hugging Face folder",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder to write to")
    parser.add_argument("--step", type=int, metavar="N", help="the run's checkpoint step_N")
    parser.add_argument(
        "--adapter", metavar="DIR", help="an adapter made elsewhere, of PEFT or MiniMind (.pth), instead of RUN"
    )
    parser.add_argument("--model", metavar="BASE", help="the adapter's base model (default: the one that it names)")
    parser.add_argument("--merge", action="store_true", help="merge the adapter, in fp32; without: the adapter alone")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights (default: as the model is stored)"
    )
    parser.add_argument(
        "--format",
        default="hf",
        choices=["hf", "gguf", "pth"],
        help="hf: a Hugging Face folder (default); pth: MiniMind's state dict",
    )
    parser.add_argument("--quant", choices=["f16", "q8_0"], help="of the weights of --format gguf (default: f16)")
    parser.add_argument(
        "--shard_size", type=size, default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)"
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="also upload the folder, into a private repository of the hub"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    """Export the model and return 0. Raises RecipeError of several kinds; nothing is left then."""
    if not options.push_to_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"
    silence_libraries(shows_progress=False)
    from sft_recipe.export.exporter import export_model
    from sft_recipe.export.options import ExportOptions
    from sft_recipe.export.source import find_source

    settings = ExportOptions(options.merge, options.dtype, options.shard_size, options.format, options.quant or "f16")
    if options.push_to_hub:
        from sft_recipe.export.hub import check_login, push

        check_login(options.push_to_hub)
    source = find_source(options.run, options.step, options.adapter, options.model)
    export = export_model(source, settings, user_path(options.out), show_progress=True)
    address = push(export.folder, options.push_to_hub) if options.push_to_hub else None
    _print(export, options.json, address)
    return 0


def _print(export: Export, as_json: bool, address: str | None) -> None:
    if as_json:
        print(json.dumps(export.as_dict() | ({"hub": address} if address else {})))
        return
    size = sum(export.files.values())
    print(f"{export.folder}: {export.kind} in {export.dtype}, {plural(len(export.files), 'file')}, {size:,} bytes")
    print(f"verified: {export.verification}")
    for remark in export.remarks:
        print(remark)
    if address:
        print(f"uploaded to {address}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes what was written
    sys.exit(main(sys.argv[1:]))
