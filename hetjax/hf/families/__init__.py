"""One home for each family of models that folders hold: what its keys are called, its config.json both ways, and for a
language model with an encoder its processor. A family is added by a file that makes a `Family` or a `Whole`
(`family.py`), and its line in `registry.py`. What members share is in `decoder.py`, `experts.py` and `tower.py`.
Imports point from `registry.py` to the families, from them to what they share, and never to the files of `hetjax/hf/`
that walk through all families (`keys.py`, `read_config.py`, `write_config.py`, `processor.py`, `export.py`).
"""
