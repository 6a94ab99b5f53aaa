# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The same training run under two pairs of layouts
#
# A vision encoder and a language model learn to answer questions about pictures, twice from the same start: once on
# devices of their own, once on the same devices with other cuts. Layouts change speed and memory, never the training
# run, so the two loss curves are equal.
#
# Open this file as a notebook with `jupytext --to notebook notebooks/layouts.py`, or run it as a script.

# %%
import dataclasses
from pathlib import Path

from hetjax.assets.easy_vqa import prepare
from hetjax.core.layout import Layout
from hetjax.run import config, experiment

root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs" / "quickstart.gin").is_file())
prepare(root / "data" / "easy-vqa")  # 5,000 pictures from the package easy-vqa; nothing where they are already there

# %% [markdown]
# The quickstart's experiment, made smaller. `emulated_devices` asks for four CPU devices; `start` sets that up, and has
# to come before the first array.

# %%
EXPERIMENT = "experiment.Experiment"
base = config.load(
    [str(root / "configs" / "quickstart.gin")],
    [
        f"{EXPERIMENT}.emulated_devices = 4",
        f"{EXPERIMENT}.num_microbatches = 2",
        "settings.DataConfig.samples_per_group = 2",
        "vision/experiment.Encoder.slots_per_group = 2",
        "optimizer.OptimizerConfig.warmup_steps = 5",
        f"train/settings.DataConfig.path = {str(root / 'data' / 'easy-vqa' / 'train.json')!r}",
        f"held_out/settings.DataConfig.path = {str(root / 'data' / 'easy-vqa' / 'test.json')!r}",
    ],
    experiment.Experiment,
)
experiment.start(base)


# %% [markdown]
# `build` makes a trainer; `step` takes a state and a batch, and gives the next state. What a step reports are device
# arrays: `float` waits for them, so the losses are read at the end.


# %%
def under(vision, llm):
    """The experiment with other layouts."""
    encoders = tuple(dataclasses.replace(e, layout=vision) for e in base.encoders)
    return dataclasses.replace(base, encoders=encoders, llm=dataclasses.replace(base.llm, layout=llm))


def train(run, steps=20):
    """The loss of each step."""
    trainer = experiment.build(run)
    print(trainer.picture(), end="\n\n")
    trainer.compile()
    state, losses = trainer.init(), []
    with experiment.train_loader(run) as loader:
        for _ in range(steps):
            state, outcome = trainer.step(state, loader.next_step(run.num_microbatches))
            losses.append(outcome.loss)
    return [float(loss) for loss in losses]


# %% [markdown]
# First the two modules side by side: the encoder cuts its pictures over two devices, the language model its heads and
# vocabulary over two others.

# %%
disjoint = train(under(vision=Layout(dp=2, devices="0-1"), llm=Layout(tp=2, devices="2-3")))

# %% [markdown]
# Then both on the same four devices: the encoder cuts its pictures over all of them, the language model its samples in
# two, each of two devices with half of the heads.

# %%
colocated = train(under(vision=Layout(dp=4), llm=Layout(dp=2, tp=2)))

# %% [markdown]
# The curves, and how far they are apart: floating-point rounding.

# %%
top = max(*disjoint, *colocated)
print("step  disjoint  colocated")
for step, (a, b) in enumerate(zip(disjoint, colocated, strict=True)):
    print(f"{step:4}  {a:8.5f}  {b:9.5f}  {'#' * round(50 * a / top)}")

apart = max(abs(a - b) / abs(a) for a, b in zip(disjoint, colocated, strict=True))
print(f"largest relative difference: {apart:.1e}")
assert apart < 1e-4
assert disjoint[-1] < 0.8 * disjoint[0], "it should learn"
