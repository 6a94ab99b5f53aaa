"""Writes SmolLM2-135M-Instruct as a Hugging Face folder: `python scripts/smollm2.py`. Needs the extra `demo`."""

import argparse
import sys

from hetjax.assets.smollm2 import prepare


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/cache/smollm2", metavar="DIR", help="default: %(default)s")
    try:
        print(f"SmolLM2-135M-Instruct is in {prepare(parser.parse_args().out)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
