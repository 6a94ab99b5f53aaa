"""Step time of one device against `transformers` on torch: the same LLaVA, batch and cores, forward, backward and SGD.

    pip install torch transformers        (the extra `torch`)
    python benchmarks/against_transformers.py [--repeats 5] [--large|--tiny] [--unroll] [--json FILE]

On a CPU in float32. On a GPU both run in bfloat16, torch (weights too) eagerly and through `torch.compile`; `--large`
is a decoder of 1B behind an encoder of 0.3B. `--unroll` runs our layers in no loop.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would spin, and take the cores from others

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import steps
import torch
import transformers
from mfu import DECODERS
from synthetic import Time, Timed, Workload, measured

from hetjax.core.layout import Layout
from models.vit import ViT

IMAGE_TOKEN = 0


SMALL = Workload(**steps.SMALL)
LARGE = dataclasses.replace(
    SMALL,
    llm=DECODERS["1b"],
    vision=ViT(
        image_size=224, patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096, output_width=2048
    ),
    samples=4,
    seq_len=2048,
    pictures=8,
)
TINY = dataclasses.replace(
    SMALL,
    llm=dataclasses.replace(SMALL.llm, width=64, num_layers=2, mlp_width=64, vocab_size=128),
    vision=dataclasses.replace(SMALL.vision, image_size=28, width=32, num_layers=2, mlp_width=64, output_width=64),
    samples=1,
    seq_len=64,
    pictures=1,
)


def main() -> None:
    """Prints the seconds of each, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--unroll", action="store_true")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--large", dest="work", action="store_const", const=LARGE, default=SMALL)
    size.add_argument("--tiny", dest="work", action="store_const", const=TINY)
    flags = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    work = dataclasses.replace(flags.work, dtype=jnp.bfloat16 if gpu else jnp.float32, unroll=flags.unroll)
    device = jax.devices()[0].device_kind
    layers = "layers in no loop" if work.unroll else "layers in a loop"
    print(f"{device}, {torch.get_num_threads()} threads, jax {jax.__version__}, torch {torch.__version__}, {layers}")
    ours = Timed(work.trainer(Layout(), Layout()), work.step())
    found: dict[str, Time] = {}
    for name in ("torch eager", "torch.compile") if gpu else ("torch eager",):
        runs = {"hetjax": ours, name: torch_step(work, gpu, compiled=name == "torch.compile")}
        times = measured(runs, repeats=flags.repeats)
        print(f"{name} beside hetjax         wall s  ratio    CPU s  ratio")
        for which, time in times.items():
            base = times["hetjax"]
            ratios = time.wall / base.wall, time.cpu / base.cpu
            print(f"{which:<26} {time.wall:9.4f} {ratios[0]:6.2f} {time.cpu:8.3f} {ratios[1]:6.2f}", flush=True)
        found[name], found[f"hetjax beside {name}"] = times[name], times["hetjax"]
        if flags.json:
            flags.json.write_text(json.dumps({key: time._asdict() for key, time in found.items()}, indent=1))


def torch_step(work: Workload, gpu: bool, *, compiled: bool) -> Callable[[], None]:
    """One SGD step of the same model in torch."""
    model = torch_model(work).to(torch.bfloat16 if gpu else torch.float32).to("cuda" if gpu else "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = work.microbatch(0)
    place = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(model.device)
    tokens = np.where(batch["vision.index"] >= 0, IMAGE_TOKEN, np.maximum(batch["tokens"], 1))
    labels = place(np.where(batch["weights"] > 0, tokens, -100)).long()
    inputs = dict(
        input_ids=place(tokens).long(),
        pixel_values=place(batch["vision.pixels"].transpose(0, 3, 1, 2)).to(model.dtype),
        attention_mask=torch.ones(tokens.shape, dtype=torch.long, device=model.device),
    )
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()

    return step


def torch_model(work: Workload) -> torch.nn.Module:
    """LLaVA with a SigLIP tower and a Llama decoder of the workload's sizes."""
    llm, vision = work.llm, work.vision
    text = transformers.LlamaConfig(
        vocab_size=llm.vocab_size,
        hidden_size=llm.width,
        intermediate_size=llm.mlp_width,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        tie_word_embeddings=False,
    )
    tower = transformers.SiglipVisionConfig(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        vision_use_head=False,
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)


if __name__ == "__main__":
    main()
