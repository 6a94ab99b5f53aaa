"""Shows the order in which a run's devices will work, and what it promises; nothing is compiled or trained.

    hetjax schedule --gin_file=configs/quickstart.gin --svg=runs/schedule.svg

The picture is of one step in simulated time, from the FLOPs of each stage. Exit status 0: shown; 2: the run cannot be
built, and why.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hetjax.core.forecast import Forecast
from hetjax.data.paths import expanded
from hetjax.run import chart, command, config, experiment
from hetjax.run.checks import check_ending


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    parser = command.new_parser("schedule", __doc__)
    parser.add_argument("--svg", metavar="FILE", help="also write the picture there, for a browser")
    parser.add_argument("--phase", type=int, default=1, metavar="N", help="of a run with phases (default 1)")
    arguments = command.parse_arguments(argv, parser, needs_workdir=False)
    flags = arguments.flags
    try:
        if flags.svg:
            check_ending("--svg", flags.svg, (".svg",))
        run = config.load(arguments.gin_files, arguments.bindings, experiment.Experiment)
        if not 1 <= flags.phase <= len(run.training):
            raise ValueError(f"--phase={flags.phase}; the run has 1 to {len(run.training)}")
        experiment.start(run)
        trainer = experiment.build(run, flags.phase - 1)
        forecast = trainer.pipeline.schedule.forecast
        print(f"{trainer.picture()}\n\n{chart.text(forecast, shutil.get_terminal_size((120, 24)).columns)}\n")
        print(f"{table(forecast)}\n\n{trainer.pipeline.promise()}")
        if run.schedule_costs == "measured":
            print(
                "by the stages' FLOPs: what they really take is measured when the run begins, which tells its plan then"
            )
        if flags.svg:
            path = Path(expanded(flags.svg))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(chart.draw({trainer.pipeline.promise(): forecast}).svg(), encoding="utf-8")
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def table(forecast: Forecast) -> str:
    """One line per stage: how much of the step its tasks take, the microbatches that it has in flight, and those with
    the ones whose weights' gradients are to come."""
    lines = [f"{'stage':<12}{'works':>7}{'in flight':>11}{'at most':>9}"]
    lines[0] += f"{'kept':>7}{'at most':>9}" if forecast.held else ""
    for key in forecast.devices:
        name = f"{key[0]}/{key[1]}"
        works = f"{forecast.works(key):.0%}"
        lines.append(f"{name:<12}{works:>7}{forecast.in_flight[key]:>11}{forecast.bounds[key]:>9}")
        lines[-1] += f"{forecast.held[key]:>7}{forecast.held_bounds[key]:>9}" if key in forecast.held else ""
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
