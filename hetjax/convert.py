"""Between Hugging Face folders and hetjax checkpoints, in files; neither direction needs torch.

    hetjax convert from_hf DIR --out CKPT           a checkpoint of parameters, and the models' settings
    hetjax convert to_hf CKPT --out DIR             a folder for transformers; a run's workdir will do too
    hetjax convert to_torch CKPT --out FILE.pt      a plain state dict (.pt or .safetensors)

What is written appears whole, or, on an error, not at all. Exit status 0: done; 2: it cannot be, and why.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from hetjax.hf import export, store
from hetjax.hf.stored import open_source
from hetjax.run import command


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    flags = _parser().parse_args(argv)
    try:
        source = open_source(flags.source)
        if flags.command == "from_hf":
            store.store(store.check_folder(source), flags.out)
        elif flags.command == "to_hf":
            size = export.parse_size(flags.max_shard_size)
            export.to_hf(source, flags.out, dtype=flags.dtype, max_shard_bytes=size, modules=_modules(flags.modules))
        else:
            export.to_torch(source, flags.out, dtype=flags.dtype, modules=_modules(flags.modules))
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {flags.out}")
    return 0


def _modules(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = command.new_parser("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "from_hf": ("a Hugging Face folder as a checkpoint", "models/llava --out runs/llava"),
        "to_hf": ("a checkpoint, or a run's newest one, as a Hugging Face folder", "runs/quickstart --out runs/hf"),
        "to_torch": ("a checkpoint's parameters as one file with a state dict", "runs/quickstart --out weights.pt"),
    }
    for name, (text, example) in about.items():
        one = commands.add_parser(name, help=text, description=text, epilog=f"hetjax convert {name} {example}")
        one.add_argument("source", metavar="DIR", help="folder, checkpoint or workdir")
        one.add_argument("--out", required=True, metavar="PATH", help="must not be there yet")
        if name != "from_hf":
            one.add_argument("--modules", metavar="A,B", help="those to export, such as llm,audio (default: all)")
            one.add_argument("--dtype", choices=list(export.DTYPES), help="of the tensors (default: as stored)")
        if name == "to_hf":
            one.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of one file (default 5GB)")
    return parser


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # files only: leave accelerators to runs
    sys.exit(main(sys.argv[1:]))
