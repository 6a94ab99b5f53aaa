"""`hetjax COMMAND ...` is `python -m hetjax.COMMAND ...`; alone it lists the commands, and needs no jax for that."""

import os
import runpy
import sys

from hetjax import __version__

USAGE = "usage: hetjax COMMAND ...; --help behind a command says more, --version which this is"
COMMANDS = {
    "train": "trains a run, or goes on with one",
    "launch": "starts several processes that are one run",
    "verify": "compares a run with training on one device",
    "curves": "draws loss, norms, speed and scores of runs",
    "schedule": "draws the order in which a run's devices work",
    "data inspect": "shows the data of a run as its model gets them",
    "convert": "Hugging Face folders to checkpoints, and back",
    "generate": "answers of a model to questions, pictures and clips",
}


def main() -> int:
    """The exit status of the command that `sys.argv` names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        lines = (f"  hetjax {command:<14} {about}" for command, about in COMMANDS.items())
        print("\n".join([USAGE, "", *lines]))
        return 0
    if name in ("-V", "--version"):
        print(f"hetjax {__version__}")
        return 0
    if name not in [command.split()[0] for command in COMMANDS]:
        from hetjax.run.ginfile import nearest  # brings gin's parser, which a list of commands can do without

        print(f"error: no command {name}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"hetjax {name}", *rest]
    if os.getcwd() not in sys.path:  # as `python -m` does, for modules of one's own that a gin file imports
        sys.path.insert(0, os.getcwd())
    runpy.run_module(f"hetjax.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
