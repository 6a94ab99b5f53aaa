"""Answers of a model, in text.

    hetjax generate --model DIR --image a.png --prompt "What is it?"
    hetjax generate --model DIR --prompts FILE.jsonl --tp 2 --emulated_devices 2

DIR is a Hugging Face folder, a checkpoint of `hetjax.convert` or the workdir of a run. Exit status 0: answered; 2: it
cannot be, and why.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from hetjax.data import ItemSpec
from hetjax.generate.generator import DTYPES, Answer, load
from hetjax.generate.prompt import Prompt, ask, read_prompts
from hetjax.generate.sample import Sampling
from hetjax.run import cluster, command, several
from hetjax.run.experiment import Experiment
from hetjax.run.watchdog import Watch


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    parser = _parser()
    flags = parser.parse_args(argv)
    for name in ("step_limit", "start_limit"):
        if not getattr(flags, name) > 0:
            parser.error(f"--{name}={getattr(flags, name):g}; it must be above 0")
    watch = Watch(flags.step_limit, flags.start_limit, of="--")
    return several.together(lambda: answer(flags, watch), watch)


def answer(flags: argparse.Namespace, watch: Watch) -> int:
    """The exit status. Several processes answer together, and the first prints."""
    try:
        sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
        if flags.emulated_devices and not cluster.is_one_of_several():
            command.emulate_devices(flags.emulated_devices)
        command.use_compilation_cache()
        model = load(flags.model, tp=flags.tp, dp=flags.dp, dtype=flags.dtype, date=flags.date)
        prompts = _prompts(flags, model.chat.items)
        settings = dict(max_new_tokens=flags.max_new_tokens, sampling=sampling, batch_size=flags.batch_size)
        watch.pauses("the first answer")  # for which it compiles
        for number, (prompt, answer) in enumerate(zip(prompts, model.stream(prompts, **settings), strict=True), 1):
            watch.steps(f"what follows answer {number} of {len(prompts)}")
            print(answer.text if len(prompts) == 1 and not flags.prompts else _line(prompt, answer), flush=True)
    except ValueError as error:
        print(f"error: {cluster.who()}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _prompts(flags: argparse.Namespace, items: Sequence[ItemSpec]) -> list[Prompt]:
    files = {"image": flags.image, "audio": flags.audio}
    if not flags.prompts:
        return [ask(text, **files) for text in flags.prompt]
    if flags.prompt or any(files.values()):
        raise ValueError("--prompts brings its own questions and files; leave out --prompt, --image and --audio")
    return read_prompts(flags.prompts, items, flags.media_root)


def _line(prompt: Prompt, answer: Answer) -> str:
    values: dict[str, Any] = dict(id=prompt.id) if prompt.id else {}
    values |= dict(question=prompt.turns[-1], answer=answer.text, tokens=len(answer.tokens), ended=answer.ended)
    return json.dumps(values, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))


def _parser() -> argparse.ArgumentParser:
    parser = command.new_parser("generate", __doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder, checkpoint or workdir")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a question; repeatable")
    asked.add_argument("--prompts", metavar="FILE", help="conversations: one a line, or a list in a .json")
    parser.add_argument("--media_root", metavar="DIR", help="where files of --prompts lie (default: beside it)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="of every --prompt; repeatable")
    parser.add_argument("--audio", action="append", default=[], metavar="FILE", help="of every --prompt; repeatable")
    parser.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default)")
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: all (default)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts at a time (default 8)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="devices that share the decoder (default 1)")
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="devices that share the prompts (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: a run's own, else as stored")
    parser.add_argument("--date", metavar="DATE", help="a folder's today, such as 2026-11-27 (default: today)")
    for name, what in (
        ("step_limit", "a batch of answers"),
        ("start_limit", "loading, or the first answer,"),
    ):
        default = getattr(Experiment, name)
        about = f"seconds that {what} may take of several processes, which else end (default {default:g})"
        parser.add_argument(f"--{name}", type=float, default=default, metavar="S", help=about)
    parser.add_argument("--emulated_devices", type=int, default=0, metavar="N", help="CPU devices to emulate")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
