"""Multimodal language models in JAX, each module under its own layout. Start at `train.py`."""

__version__ = "0.1.0"
