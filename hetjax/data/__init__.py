"""Conversations with pictures and clips become microbatches of fixed shape. Start at `loader.py`.

Imports nothing else of hetjax, and no jax: runs, folders and generation stand above and import from here.
"""

from hetjax.data.conversations import Sample
from hetjax.data.items import ItemSpec, blank
from hetjax.data.loader import Loader
from hetjax.data.pictures import Pictures
from hetjax.data.problems import Problem
from hetjax.data.settings import ChatTemplate, DataConfig, DataError, Template
from hetjax.data.sounds import Sounds

__all__ = [
    "ChatTemplate",
    "DataConfig",
    "DataError",
    "ItemSpec",
    "Loader",
    "Pictures",
    "Problem",
    "Sample",
    "Sounds",
    "Template",
    "blank",
]
