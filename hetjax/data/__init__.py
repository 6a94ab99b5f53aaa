"""Conversations with pictures become global microbatches of fixed shape. Start at `loader.py`; imports no jax."""

from hetjax.data.conversations import Problem, Sample
from hetjax.data.loader import Loader
from hetjax.data.pictures import blank
from hetjax.data.settings import DataConfig, DataError, ItemSpec, Template

__all__ = ["DataConfig", "DataError", "ItemSpec", "Loader", "Problem", "Sample", "Template", "blank"]
