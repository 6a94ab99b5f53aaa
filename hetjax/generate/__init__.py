"""Answers of a model: prompts become tokens, tokens a memory of keys and values, and that the next tokens.

from hetjax import generate

model = generate.load("runs/quickstart")  # a run; or a Hugging Face folder, or a converted checkpoint
answers = model(["Hello", generate.ask("Which colour is it?", image="a.png")], max_new_tokens=16)
print(answers[0].text)

Imports point down, to the Hugging Face folders, runs, the core and the data; commands stand above.
"""

from hetjax.generate.generator import Answer, Generator, load
from hetjax.generate.prompt import Prompt, ask, read_prompts
from hetjax.generate.sample import Sampling

__all__ = ["Answer", "Generator", "Prompt", "Sampling", "ask", "load", "read_prompts"]
