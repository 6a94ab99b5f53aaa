"""Hugging Face folders in and out: configs, key names, safetensors. Needs no torch."""
