"""A made-up data set of coloured pictures with a word tokenizer, and a run on it, for benchmarks of whole commands."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

SAMPLES = 64
GIN = """
from hetjax.core import layout, optimizer
from hetjax.data import settings
from hetjax.run import experiment
from models import decoder, vit

experiment.Experiment.encoders = [@vision/experiment.Encoder()]
experiment.Experiment.llm = @llm/experiment.LanguageModel()
experiment.Experiment.optimizer = @optimizer.OptimizerConfig()
experiment.Experiment.data = @settings.DataConfig()
experiment.Experiment.steps = 8
experiment.Experiment.save_every = 4
experiment.Experiment.num_microbatches = 2
experiment.Experiment.log_every = 1
vision/experiment.Encoder.model = @vit.ViT()
vision/experiment.Encoder.slots_per_group = 2
vit.ViT.image_size = 56
vit.ViT.patch_size = 14
vit.ViT.width = 128
vit.ViT.num_layers = 2
vit.ViT.num_heads = 2
vit.ViT.mlp_width = 256
vit.ViT.output_width = 128
llm/experiment.LanguageModel.model = @decoder.Decoder()
decoder.Decoder.vocab_size = 128
decoder.Decoder.width = 128
decoder.Decoder.num_layers = 2
decoder.Decoder.num_heads = 4
decoder.Decoder.num_kv_heads = 2
decoder.Decoder.head_dim = 64
decoder.Decoder.mlp_width = 256
optimizer.OptimizerConfig.learning_rate = 1e-3
settings.DataConfig.seq_len = 128
settings.DataConfig.samples_per_group = 2
settings.DataConfig.groups = 4
settings.DataConfig.workers = 1
"""


def write(directory: Path) -> Path:
    """run.gin in `directory`, with data beside it: one picture a sample, answers of different lengths."""
    rng = np.random.default_rng(0)
    words = ["<pad>", "<unk>", "<end>", "which", *(f"w{n}" for n in range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    entries = []
    for n in range(SAMPLES):
        Image.new("RGB", (60, 56), tuple(int(c) for c in rng.integers(0, 256, 3))).save(directory / f"{n}.png")
        answer = " ".join(f"w{k}" for k in rng.integers(0, 100, 1 + n % 40))
        turns = [{"from": "human", "value": "<image>\nwhich"}, {"from": "gpt", "value": answer}]
        entries.append({"id": str(n), "image": f"{n}.png", "conversations": turns})
    (directory / "data.json").write_text(json.dumps(entries))
    path = directory / "run.gin"
    path.write_text(f"{GIN}settings.DataConfig.path = {str(directory / 'data.json')!r}\n")
    return path
