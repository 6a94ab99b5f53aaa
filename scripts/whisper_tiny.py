"""Writes whisper-tiny.en as a Hugging Face folder: `python scripts/whisper_tiny.py`."""

import argparse
import sys

from hetjax.assets.whisper_tiny import prepare


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/cache/whisper", metavar="DIR", help="default: %(default)s")
    try:
        print(f"whisper-tiny.en is in {prepare(parser.parse_args().out)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
