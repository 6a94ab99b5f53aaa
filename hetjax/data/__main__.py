"""`python -m hetjax.data inspect ...` starts hetjax/inspect.py, by name: the command stands above the runs that it
reads, and these above the data."""

import runpy

runpy.run_module("hetjax.inspect", run_name="__main__")
