"""Writes easy-VQA as LLaVA JSON: `python scripts/easy_vqa.py --out DIR`. Needs the extra `demo`."""

import argparse
import sys

from hetjax.data import DataError
from hetjax.data.easy_vqa import prepare


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="gets train.json, test.json, images/, ...")
    try:
        print(f"easy-VQA is in {prepare(parser.parse_args().out)}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
