"""Shows the first microbatches of a run's data, as its model gets them: tokens, masks, positions, pictures.

    hetjax data inspect --gin_file=configs/quickstart.gin --rows=2 --pictures=runs/pictures

Exit status 0: shown; 2: the data cannot be read, and why.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hetjax.data import inspect
from hetjax.data.paths import expanded
from hetjax.run import command, config, experiment


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    parser = command.new_parser("data", __doc__)
    parser.add_argument("command", choices=["inspect"], help="what to do with the data")
    parser.add_argument("--microbatches", type=int, default=1, metavar="N", help="how many to show (default 1)")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows of each to show (default 2)")
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="also write there what the encoders get, clips as spectrograms",
    )
    arguments = command.parse_arguments(argv, parser, needs_workdir=False)
    flags = arguments.flags
    try:
        run = config.load(arguments.gin_files, arguments.bindings, experiment.Experiment)
        with experiment.train_loader(run) as loader:
            for number, microbatch in enumerate(loader.next_step(flags.microbatches)):
                text = inspect.describe(
                    microbatch,
                    loader.tokenizer,
                    loader.items,
                    groups=loader.config.groups,
                    rows=flags.rows,
                    colour=sys.stdout.isatty(),
                )
                print(f"[{number}] {text}\n")
                if flags.pictures:
                    directory = Path(expanded(flags.pictures)) / f"microbatch-{number}"
                    print(f"wrote {len(inspect.write_pictures(microbatch, loader.items, directory))} to {directory}\n")
            for problem in loader.bad:
                print(f"bad: {problem}")
            print(loader.tally.report())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
