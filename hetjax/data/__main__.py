"""`python -m hetjax.data inspect ...` calls hetjax/inspect.py, by name: the command stands above the runs that it
reads, and these above the data."""

import importlib
import sys

sys.exit(importlib.import_module("hetjax.inspect").main(sys.argv[1:]))
