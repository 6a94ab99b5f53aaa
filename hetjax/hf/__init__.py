"""Hugging Face folders in and out: configs, key names, safetensors. Needs no torch.

Imports point down, to runs (whose workdirs are folders too), the core, the data and the models; generation, the assets
and the commands stand above.
"""
