"""What we compute from a folder and what transformers does: output, loss and gradients, by the hub's keys.

Skips the test file that imports it where torch and transformers are not installed: pip install torch==2.13.0, then
-e '.[torch]'.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetjax.core import stacks
from hetjax.core.graph import Graph, Module, vlm
from hetjax.core.layout import Layout
from hetjax.hf import keys
from hetjax.hf.families import registry
from hetjax.hf.parts import Parts
from hetjax.judge.reference import apply_module, mean_loss
from hetjax.run.names import nested
from models.contract import ModuleDef, Part

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
in_transformers = importlib.import_module("in_transformers")  # imports both

QUIET = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Outcome(NamedTuple):
    """Logits and loss of a language model, or features of an encoder alone and their projection; and its gradients."""

    output: np.ndarray
    scalar: float
    gradients: Mapping[str, np.ndarray]  # by the hub's keys


def ours(source: Any, microbatch: families.Arrays, dtype: Any = jnp.float32) -> Outcome:
    """What we compute from a source, on one device, with float32 parameters."""
    params = jax.tree.map(lambda a: a.astype("float32"), whole(source))
    made = jax.jit(jax.value_and_grad(forward(source, microbatch, dtype), has_aux=True))
    (scalar, output), grads = made(params)
    return Outcome(np.asarray(output), float(scalar), dict(by_key(source, grads)))


def forward(source: Any, microbatch: families.Arrays, dtype: Any = jnp.float32) -> Callable[[Any], tuple[Any, Any]]:
    """The function from parameters to (scalar, output)."""
    arrays = {k: jnp.asarray(v) for k, v in microbatch.items()}

    def language(params: Any) -> tuple[Any, Any]:
        net = graph(source.models, {}, dtype)
        edges = {e.name: apply_module(e.definition, params[e.name], {}, arrays)["x"] for e in net.encoders}
        y = apply_module(net.sink.definition, params["llm"], edges, arrays)
        return mean_loss(net, params, arrays), y["x"].astype("float32") @ y["head"].astype("float32")

    def encoder(params: Any) -> tuple[Any, Any]:
        ((name, model),) = source.models.items()
        features = apply_module(*_without_projector(name, model, params[name]), {}, arrays)["x"]
        return (features * in_transformers.directions(features.shape)).mean(), features

    return language if "llm" in source.models else encoder


def _without_projector(name: str, model: Any, params: Any) -> tuple[ModuleDef, Any]:
    """An encoder that gives its features as they are, and its parameters."""
    definition = model.module(jnp.float32)
    if name == "vision":
        last = Part(definition.last.init, lambda params, carry, batch, axes: carry, {})
        return dataclasses.replace(definition, last=last), params | {"last": {}}
    same = {"weight": jnp.eye(model.width), "bias": jnp.zeros(model.width)}
    return definition, params | {"last": params["last"] | {"projector": same}}


def theirs(model: Any, source: Any, microbatch: families.Arrays) -> Outcome:
    """What transformers' model computes; the gradients stay in it."""
    output, scalar = in_transformers.run(model, families.for_transformers(microbatch))
    scalar.backward()
    found = {name: p.grad.float().numpy() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(output.detach().float().numpy(), scalar.item(), stored(found, source))


def assert_same(got: Outcome, wanted: Outcome, source: Any) -> None:
    """Output and scalar to 1e-5, each gradient to 1e-4 of its norm, or of a hundredth of its module's: some (key
    biases) have a true gradient of zero."""
    np.testing.assert_allclose(got.output, wanted.output, rtol=0, atol=1e-5)
    assert abs(got.scalar - wanted.scalar) <= 1e-5
    assert got.gradients.keys() == wanted.gradients.keys()
    for module, errors in leaf_errors(got.gradients, wanted.gradients, source).items():
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-4, (module, worst, errors[worst])


def leaf_errors(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], source: Any
) -> dict[str, dict[str, float]]:
    """Module -> key -> relative error."""
    found = {}
    places = keys.places(Parts(**source.models))
    for module in source.models:
        own = [key for name, place in places.items() if name.startswith(f"{module}/") for key in place.keys]
        norm = np.sqrt(sum(float((wanted[key] ** 2).sum()) for key in own))
        scale = {key: max(float(np.linalg.norm(wanted[key])), 0.01 * norm) for key in own}
        found[module] = {key: float(np.linalg.norm(got[key] - wanted[key])) / scale[key] for key in own}
    return found


def graph(models: Mapping[str, Any], layouts: Mapping[str, Layout], dtype: Any = jnp.float32) -> Graph:
    """A language model with its encoders."""
    layout = lambda name: layouts.get(name, Layout())
    encoders = tuple(Module(n, models[n].module(dtype, name=n), layout(n)) for n in models if n != "llm")
    definition = models["llm"].module(dtype, encoders=tuple(e.name for e in encoders))
    return vlm(encoders, Module("llm", definition, layout("llm")))


def whole(source: Any) -> dict[str, Any]:
    """All parameters of a source as one device has them, layers stacked."""
    arrays = {n: a[(slice(None),) * len(source.arrays[n].shape)] for n, a in source.fetch(list(source.arrays)).items()}
    tree = nested(arrays)
    for module in tree.values():
        rows = [jax.tree.map(lambda a: a[None], module["layers"][k]) for k in sorted(module["layers"])]
        module["layers"] = stacks.join(rows, np.concatenate)
    return jax.tree.map(jnp.asarray, tree)


def by_key(source: Any, tree: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(key in the hub's layout, value in torch's shape) of parameters or gradients."""
    for name, place in keys.places(Parts(**source.models)).items():
        value = np.asarray(leaf(source.models, tree, name))
        for row, key in enumerate(place.keys):
            yield key, place.to_torch(value, row)


def leaf(models: Mapping[str, Any], tree: Mapping[str, Any], name: str) -> Any:
    """What is called `name` ("llm/layers/0003/attention/q") in a tree whose layers are stacked."""
    module, part, *rest = name.split("/")
    layer = int(rest.pop(0)) if part == "layers" else None
    node = tree[module][part]
    for step in rest:
        node = node[step]
    if layer is None:
        return node
    definition = models[module].module("float32")
    return node[stacks.holders(definition, rest, 0, definition.num_layers).index(layer)]


def stored(found: Mapping[str, np.ndarray], source: Any) -> dict[str, np.ndarray]:
    """Key in the hub's layout -> gradient, of gradients by the names that transformers, 4.57 or 5, gives them."""
    parts = Parts(**source.models)
    named = {key: value for name, grad in found.items() for key, value in _stored(name, grad, parts)}
    if parts.llm is not None and parts.llm.tied:  # Qwen2-Audio's class holds both, and ties nothing
        for head in [key for key in named if key.endswith("lm_head.weight")]:
            embed = head.replace("lm_head", "model.embed_tokens")
            named[embed] = named[embed] + named.pop(head)
    for name, place in keys.places(parts).items():
        if name.endswith("moe/bias"):  # a buffer there, and without a gradient here
            named[place.keys[0]] = np.zeros(place.torch_shape, np.float32)
        if place.by_row:  # 4.57 leaves an expert that no token chose without a gradient
            named = {key: np.zeros(place.torch_shape, np.float32) for key in place.keys} | named
    return named


def _stored(name: str, value: np.ndarray, parts: Parts) -> Iterator[tuple[str, np.ndarray]]:
    """Version 5 fuses experts and renames Mixtral's."""
    key = keys.canonical(name, parts)
    if parts.llm is None or parts.llm.experts is None or ".mlp." not in key or "vision" in key:
        yield key, value
        return
    mixtral = registry.family_of(parts.llm).kind == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    stem = (key.replace(".mlp.", ".block_sparse_moe.") if mixtral else key).rpartition(".")[0]
    if key.endswith("experts.gate_up_proj"):
        for e, both in enumerate(value):
            for part, half in zip(names, np.split(both, 2), strict=False):
                yield f"{stem}.{e}.{part}.weight", half
    elif key.endswith("experts.down_proj"):
        for e, down in enumerate(value):
            yield f"{stem}.{e}.{names[2]}.weight", down
    else:
        yield key.replace(".mlp.", ".block_sparse_moe.") if mixtral else key, value
