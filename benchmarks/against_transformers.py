"""Step time of one device against `transformers` on torch: the same LLaVA, batch and cores, forward, backward and SGD.

    pip install torch transformers        (the extra `torch`)
    python benchmarks/against_transformers.py [--repeats 5] [--bfloat16]

On a CPU in float32. On a GPU both run in bfloat16, torch eagerly and through `torch.compile`.
"""

import argparse
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from synthetic import Timed, Workload, median_seconds

from hetjax.core.layout import Layout
from models.decoder import Decoder
from models.vit import ViT

IMAGE_TOKEN = 0


def main() -> None:
    """Prints the median step of each, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    gpu = jax.default_backend() == "gpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    work = Workload(
        llm=Decoder(vocab_size=4096, width=512, num_layers=6, num_heads=8, num_kv_heads=4, mlp_width=1536),
        vision=ViT(
            image_size=112, patch_size=14, width=256, num_layers=4, num_heads=8, mlp_width=1024, output_width=512
        ),
        samples=4,
        seq_len=256,
        pictures=4,
        num_microbatches=1,
        dtype=jnp.bfloat16 if gpu else jnp.float32,
    )
    runs: dict[str, Callable[[], None]] = {"hetjax": Timed(work.trainer(Layout(), Layout()), work.step())}
    runs["torch eager"] = torch_step(work, gpu, compiled=False)
    if gpu:
        runs["torch.compile"] = torch_step(work, gpu, compiled=True)
    seconds = median_seconds(runs, repeats=repeats)
    device = jax.devices()[0].device_kind
    print(f"{device}, {torch.get_num_threads()} threads, jax {jax.__version__}, torch {torch.__version__}")
    for name, value in seconds.items():
        print(f"{name:<14} {value:7.3f} s  {value / seconds['hetjax']:5.2f} of hetjax")


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
