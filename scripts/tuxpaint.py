"""Writes Tux Paint's stamps and their spoken descriptions as LLaVA JSON: `python scripts/tuxpaint.py`."""

import argparse
import sys

from hetjax.assets.tuxpaint import prepare


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/cache/tuxpaint", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--stamps", metavar="DIR", help="of stamps; without it a Debian package is fetched")
    arguments = parser.parse_args()
    try:
        print(f"Tux Paint's stamps are in {prepare(arguments.out, arguments.stamps)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
