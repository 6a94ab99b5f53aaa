"""Tokens per second of greedy decoding with a cache, against `transformers` on torch: one model, prompts and cores.

    pip install torch transformers        (the extra `torch`)
    python benchmarks/generate.py [--repeats 3] [--layers 30]

A decoder of SmolLM2-135M's sizes with random weights, in float32 on a CPU and in bfloat16 on a GPU; 64 tokens behind
prompts of 64, one and eight at a time. Every answer has all its tokens: no token ends one.
"""

import argparse
import os
import tempfile
from pathlib import Path

import jax
import torch
import transformers
from synthetic import median_seconds
from tokenizers import Tokenizer, models, pre_tokenizers

from hetjax import generate

PROMPT = NEW = 64  # tokens


def main() -> None:
    """Prints tokens per second of each, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    flags = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), flags.layers)
        ours = generate.load(directory, dtype="bfloat16" if gpu else "float32")
        kind = torch.bfloat16 if gpu else torch.float32
        theirs = (
            transformers.LlamaForCausalLM.from_pretrained(directory, dtype=kind).to("cuda" if gpu else "cpu").eval()
        )
    device = jax.devices()[0].device_kind
    print(f"{device}, {torch.get_num_threads()} threads, jax {jax.__version__}, torch {torch.__version__}")
    for count in (1, 8):
        prompts = [" ".join(f"w{(7 * row + 3 * n) % 1000}" for n in range(PROMPT)) for row in range(count)]
        ids = torch.tensor([ours.chat.tokenizer.encode(p).ids for p in prompts]).to(theirs.device)

        def torch_answers(ids: torch.Tensor = ids) -> list[list[int]]:
            mask = torch.ones_like(ids)
            with torch.no_grad():
                out = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            return out[:, PROMPT:].tolist()

        def our_answers(prompts: list[str] = prompts) -> list[list[int]]:
            return [answer.tokens for answer in ours(prompts, max_new_tokens=NEW, batch_size=len(prompts))]

        same = sum(a == b for a, b in zip(our_answers(), torch_answers(), strict=True))
        seconds = median_seconds({"hetjax": our_answers, "transformers": torch_answers}, repeats=flags.repeats)
        rates = {name: count * NEW / value for name, value in seconds.items()}
        print(f"{count} prompt(s), {same} answer(s) the same")
        for name, rate in rates.items():
            print(f"  {name:<13} {rate:8.1f} tokens/s  {rate / rates['transformers']:5.2f} of transformers")


def write(directory: Path, layers: int) -> None:
    """The folder of the model, with a tokenizer of words."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers)
    heads = dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **ends)).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(1000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    main()
