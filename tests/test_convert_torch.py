"""What transformers computes from a folder is what we compute from it, and what it gets back after a step is the same.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs
from hf_folders import IMAGE_TOKEN, llava, text, vision
from PIL import Image

from hetjax import convert, stacks, train
from hetjax.graph import Graph, Module, vlm
from hetjax.hf import export, initial, keys
from hetjax.hf.stored import nested, open_source
from hetjax.layout import Layout
from hetjax.optimizer import OptimizerConfig
from hetjax.reference import apply_module, layer_params, mean_loss
from hetjax.trainer import State, Trainer
from models.axes import ONE_DEVICE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
TIED = dict(tie_word_embeddings=True)
CASES = {
    "llama": text("llama"),
    "llama, one kv head, wide heads": text("llama", num_key_value_heads=1, head_dim=12),
    "llama 3.1": text("llama", rope_theta=500000.0, rope_scaling=LLAMA3, **TIED),
    "llama, linear rope": text("llama", rope_scaling=dict(rope_type="linear", factor=4.0)),
    "mistral": text("mistral", num_key_value_heads=4),
    "mistral with a window": text("mistral", sliding_window=3),
    "qwen2, tied": text("qwen2", **TIED),
    "qwen2 with a window": text("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=0),
    "qwen3": text("qwen3", head_dim=10, rope_theta=1e6),
    "mixtral": text("mixtral"),
    "mixtral, one kv head, a window, tied": text("mixtral", num_key_value_heads=1, sliding_window=3, **TIED),
    "qwen3_moe": text("qwen3_moe", norm_topk_prob=True, head_dim=10),
    "qwen3_moe, dense layers": text("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1, 2], **TIED),
    "clip + mixtral": llava(text("mixtral"), vision("clip")),
    "siglip + qwen3_moe, every other layer": llava(
        text("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2), vision("siglip")
    ),
    "clip + llama": llava(text("llama"), vision("clip")),
    "clip + qwen3, last layer, class token": llava(
        text("qwen3"),
        vision("clip"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=5,
    ),
    "siglip + qwen2, tied": llava(text("qwen2", **TIED), vision("siglip")),
    "clip + qwen2": llava(text("qwen2"), vision("clip")),
    "siglip + qwen3": llava(text("qwen3"), vision("siglip")),
    "siglip + mixtral": llava(text("mixtral"), vision("siglip")),
    "clip + qwen3_moe": llava(text("qwen3_moe"), vision("clip")),
    "siglip + mistral, last layer": llava(text("mistral"), vision("siglip"), vision_feature_layer=-1),
    "clip + mistral, three layers": llava(text("mistral"), vision("clip"), vision_feature_layer=[-1, 0, 1]),
    "siglip + llama, two layers, without the first patch and biases": llava(
        text("llama"),
        vision("siglip"),
        vision_feature_layer=[-3, -2],
        vision_feature_select_strategy="default",
        multimodal_projector_bias=False,
        image_seq_length=3,
    ),
    "clip + llama 3.1, first layer": llava(text("llama", rope_scaling=LLAMA3), vision("clip"), vision_feature_layer=1),
}


def load(directory: Path) -> Any:
    """transformers' model, which must find every key and no other."""
    name = open_source(directory).extras  # also checks the folder
    config = next(iter(name.values())).config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def batch(rows: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Two samples of two pictures and of one (in the third slot), `rows` tokens each; none with `rows` 0."""
    rng = np.random.default_rng(seed)
    length = 8 + 2 * max(rows, 1)
    tokens = rng.integers(0, IMAGE_TOKEN, (2, length)).astype(np.int32)
    index = np.full((2, length), -1, np.int32)
    for sample, place, slot in ((0, 1, 0), (0, 3 + rows, 1), (1, 2, 2)) if rows else ():
        tokens[sample, place : place + rows] = IMAGE_TOKEN
        index[sample, place : place + rows] = slot * rows + np.arange(rows)
    targets = np.roll(tokens, -1, 1)
    weights = (targets != IMAGE_TOKEN).astype(np.float32)
    weights[:, -1] = 0
    whole = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
    found = dict(tokens=tokens, positions=whole, segment_ids=np.ones_like(whole), targets=targets, weights=weights)
    if rows:
        pixels = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
        pixels[3] = 0  # an empty slot
        found |= {"vision.index": index, "vision.pixels": pixels}
    return found


def torch_loss(model: Any, microbatch: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """(loss, logits) of transformers."""
    tokens = torch.tensor(microbatch["tokens"], dtype=torch.long)
    labels = torch.where(tokens == IMAGE_TOKEN, -100, tokens)
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)
    if "vision.pixels" in microbatch:
        inputs["pixel_values"] = torch.tensor(microbatch["vision.pixels"][:3].transpose(0, 3, 1, 2).copy())
    out = model(**inputs)
    return out.loss, out.logits


def graph(models: dict[str, Any], layouts: dict[str, Layout], dtype: Any = jnp.float32) -> Graph:
    encoders = tuple(
        Module(n, models[n].module(dtype, name=n), layouts.get(n, Layout())) for n in models if n == "vision"
    )
    definition = models["llm"].module(dtype, encoders=tuple(e.name for e in encoders))
    return vlm(encoders, Module("llm", definition, layouts.get("llm", Layout())))


def whole(source: Any) -> dict[str, Any]:
    """All parameters of a source as one device has them, layers stacked."""
    arrays = {n: a[(slice(None),) * len(source.arrays[n].shape)] for n, a in source.fetch(list(source.arrays)).items()}
    tree = nested(arrays)
    for module in tree.values():
        rows = [jax.tree.map(lambda a: a[None], module["layers"][k]) for k in sorted(module["layers"])]
        module["layers"] = stacks.join(rows, np.concatenate)
    return jax.tree.map(jnp.asarray, tree)


def by_key(source: Any, tree: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(key in the hub's layout, value in torch's shape) of parameters or gradients."""
    for name, place in keys.places(source.parts).items():
        module, part, *rest = name.split("/")
        node, layer = tree[module][part], None
        if part == "layers":
            layer, *rest = rest
        for step in rest:
            node = node[step]
        if layer is not None:
            node = node[stacked_row(source.models[module], rest, int(layer))]
        for row, key in enumerate(place.keys):
            yield key, place.to_torch(np.asarray(node), row)


def stacked_row(model: Any, path: list[str], layer: int) -> int:
    """Where a leaf, stacked over the layers that have it, holds a layer."""
    definition = model.module("float32")
    return stacks.holders(definition, path, 0, definition.num_layers).index(layer)


def stored(name: str, value: np.ndarray, source: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(key in the hub's layout, value) of what transformers holds; version 5 fuses experts and renames Mixtral's."""
    key = keys.canonical(name, source.parts)
    if source.parts.llm is None or source.parts.llm.experts is None or ".mlp." not in key or "vision" in key:
        yield key, value
        return
    mixtral = not source.parts.llm.qk_norm
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


SLOW = {
    *("mixtral, one kv head, a window, tied", "qwen3_moe", "qwen3_moe, dense layers", "clip + mixtral"),
    *("clip + qwen2", "siglip + qwen3", "siglip + mixtral", "clip + qwen3_moe"),
}
MARKED = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.fixture(scope="module", params=MARKED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folders.write(tmp_path_factory.mktemp("hf") / "folder", CASES[request.param])


def test_logits_loss_and_every_gradient_are_those_of_transformers(folder: Path) -> None:
    source, model = open_source(folder), load(folder)
    rows = source.models["vision"].rows if "vision" in source.models else 0
    microbatch = batch(rows)
    expected, expected_logits = torch_loss(model, microbatch)
    expected.backward()

    net, params = graph(dict(source.models), {}), whole(source)
    arrays = {k: jnp.asarray(v) for k, v in microbatch.items()}
    edges = {e.name: apply_module(e.definition, params[e.name], {}, arrays)["x"] for e in net.encoders}
    y = apply_module(net.sink.definition, params["llm"], edges, arrays)
    loss, grads = jax.value_and_grad(lambda p: mean_loss(net, p, arrays))(params)

    np.testing.assert_allclose(np.asarray(y["x"] @ y["head"]), expected_logits.detach().numpy(), atol=1e-5)
    assert abs(float(loss) - expected.item()) <= 1e-5
    wanted = gradients(model, source)
    got = dict(by_key(source, grads))
    assert got.keys() == {k for k in wanted if not (source.parts.llm.tied and k.endswith("lm_head.weight"))}
    norm = np.sqrt(sum(float((g**2).sum()) for g in wanted.values()))
    for key, g in got.items():
        scale = max(float(np.linalg.norm(wanted[key])), 0.01 * norm)
        assert np.linalg.norm(g - wanted[key]) / scale <= 1e-4, key


def gradients(model: Any, source: Any) -> dict[str, np.ndarray]:
    """Key in the hub's layout -> gradient of a model of transformers."""
    found = [(n, p.grad.float().numpy()) for n, p in model.named_parameters() if p.grad is not None]
    return {key: g for name, grad in found for key, g in stored(name, grad, source)}


@pytest.mark.parametrize("case", ["clip + llama", pytest.param("siglip + qwen2, tied", marks=pytest.mark.slow)])
def test_in_bfloat16_logits_and_gradients_are_off_by_the_rounding_that_transformers_has(
    case: str, tmp_path: Path
) -> None:
    folder = hf_folders.write(tmp_path / "folder", CASES[case], dtype=ml_dtypes.bfloat16)
    source, exact, rounded = open_source(folder), load(folder), load(folder).to(torch.bfloat16)
    microbatch = batch(source.models["vision"].rows)
    both = [torch_loss(model, microbatch) for model in (exact, rounded)]
    for loss, _ in both:
        loss.backward()
    expected, theirs = (logits.detach().float().numpy() for _, logits in both)

    net, params = (
        graph(dict(source.models), {}, jnp.bfloat16),
        jax.tree.map(lambda a: a.astype("float32"), whole(source)),
    )
    arrays = {k: jnp.asarray(v) for k, v in microbatch.items()}
    edges = {e.name: apply_module(e.definition, params[e.name], {}, arrays)["x"] for e in net.encoders}
    y = apply_module(net.sink.definition, params["llm"], edges, arrays)
    assert y["x"].dtype == jnp.bfloat16
    ours = np.asarray(y["x"].astype("float32") @ y["head"].astype("float32"))
    assert np.linalg.norm(ours - expected) <= 1.5 * np.linalg.norm(theirs - expected)

    got = dict(by_key(source, jax.grad(lambda p: mean_loss(net, p, arrays))(params)))
    wanted, rough = gradients(exact, source), gradients(rounded, source)
    off = lambda found: np.sqrt(sum(float(((found[k] - wanted[k]) ** 2).sum()) for k in got))
    assert off(got) <= 1.5 * off(rough)


ROWS = 4
LAYOUTS = {
    "tp 2 x pp 2 | dp 2": dict(llm=Layout(tp=2, pp=2, devices="0-3"), vision=Layout(dp=2, devices="4-5")),
    "dp 2 x tp 2 | tp 2 x pp 2": dict(llm=Layout(dp=2, tp=2, devices="0-3"), vision=Layout(tp=2, pp=2, devices="4-7")),
}
STEPPED = [
    ("clip + llama", "tp 2 x pp 2 | dp 2"),
    ("siglip + qwen2, tied", "dp 2 x tp 2 | tp 2 x pp 2"),
    ("siglip + qwen3_moe, every other layer", "tp 2 x pp 2 | dp 2"),
]


@pytest.mark.parametrize(("case", "layouts"), STEPPED)
def test_a_step_of_sgd_under_layouts_exports_what_torch_gets(case: str, layouts: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", CASES[case])
    source, model = open_source(folder), load(folder)
    microbatch = batch(ROWS)
    # our two groups own two slots each: the second sample's picture lies in the third
    trainer = Trainer(
        graph(dict(source.models), LAYOUTS[layouts]),
        devices=jax.devices(),
        batch={k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in microbatch.items()},
        groups=2,
        num_microbatches=1,
        config=OptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=None),
    )
    trainer.compile()
    state = initial.state(trainer, initial.open_starts(trainer.graph, dict.fromkeys(source.models, str(folder))))
    state, outcome = trainer.step(state, [microbatch])

    expected, _ = torch_loss(model, microbatch)
    expected.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    assert abs(float(outcome.loss) - expected.item()) <= 1e-5
    export.to_hf(_Live(folder, trainer, state), tmp_path / "out")
    after, before = load(tmp_path / "out").state_dict(), load(folder).state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(after[name].numpy(), value.numpy(), atol=1e-5, err_msg=name)
    assert any(not torch.equal(after[name], before[name]) for name in after)


class _Live:
    """A trainer's state as a source."""

    def __init__(self, folder: Path, trainer: Trainer, state: State) -> None:
        source = open_source(folder)
        self.path, self.models, self.arrays, self.extras = folder, source.models, source.arrays, source.extras
        self._values = trainer.whole(state.params)

    def fetch(self, names: list[str]) -> dict[str, np.ndarray]:
        found = {}
        for name in names:
            module, part, *rest = name.split("/")
            node: Any = self._values[module][part]
            layer = int(rest.pop(0)) if part == "layers" else None
            for step in rest:
                node = node[step]
            found[name] = node if layer is None else node[stacked_row(self.models[module], rest, layer)]
        return found


def test_a_run_from_scratch_is_opened_by_transformers_with_its_processor(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    changes = runs.settings(steps=1) | {"vit.ViT.feature_layer": -2, "experiment.Encoder.shortest_edge": 9}
    assert train.main(runs.arguments(gin, tmp_path / "run", changes)) == 0
    assert convert.main(["to_hf", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    run = runs.load(gin, changes)
    source, again = open_source(tmp_path / "run"), open_source(tmp_path / "out")
    microbatch = batch(ROWS)
    net, params = graph(dict(source.models), {}), whole(source)
    arrays = {k: jnp.asarray(v) for k, v in microbatch.items()}

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    made = processor(images=[picture], text="what <image> is it", return_tensors="pt")
    np.testing.assert_array_equal(
        made["pixel_values"][0].numpy().transpose(1, 2, 0),
        run.encoders[0].items.read(tmp_path / "a.png").values["pixels"],
    )
    token = next(iter(again.extras.values())).config["image_token_index"]
    assert (made["input_ids"] == token).sum() == ROWS

    model = load(tmp_path / "out")
    tokens = np.where(microbatch["vision.index"] >= 0, token, microbatch["tokens"] % token)
    arrays["tokens"] = jnp.asarray(tokens)
    edges = {"vision": apply_module(net.encoders[0].definition, params["vision"], {}, arrays)["x"]}
    y = apply_module(net.sink.definition, params["llm"], edges, arrays)
    inputs = torch.tensor(microbatch["vision.pixels"][:3].transpose(0, 3, 1, 2).copy())
    expected = model(input_ids=torch.tensor(tokens, dtype=torch.long), pixel_values=inputs).logits
    np.testing.assert_allclose(np.asarray(y["x"] @ y["head"]), expected.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_a_decoder_and_a_tower_that_came_apart_are_exported_together(feature_layer: int, tmp_path: Path) -> None:
    llm = open_source(hf_folders.write(tmp_path / "llm", text("qwen2", image_token_index=IMAGE_TOKEN)))
    tower = open_source(hf_folders.write(tmp_path / "tower", vision("siglip"), dtype=np.float16))
    hf_folders.write(tmp_path / "whole", llava(text("qwen2"), vision("siglip"), vision_feature_layer=feature_layer))
    mixed = _Mixed(llm, tower, open_source(tmp_path / "whole"))
    export.to_hf(mixed, tmp_path / "out", dtype="float32")
    microbatch = batch(ROWS)
    net, params = graph(dict(mixed.models), {}), whole(mixed)
    with torch.no_grad():
        expected, _ = torch_loss(load(tmp_path / "out"), microbatch)
    assert (
        abs(float(mean_loss(net, params, {k: jnp.asarray(v) for k, v in microbatch.items()})) - expected.item()) <= 1e-5
    )


class _Mixed:
    """What a run holds whose decoder and tower started from two folders, and its projector from a third."""

    def __init__(self, llm: Any, tower: Any, rest: Any) -> None:
        self.path, self.models = llm.path, rest.models
        self.extras = {"llm": llm.extras["llm"], "vision": tower.extras["vision"]}
        self._parts = (llm, tower, rest)
        self.arrays = {name: next(s.arrays[name] for s in self._parts if name in s.arrays) for name in rest.arrays}

    def fetch(self, names: list[str]) -> dict[str, Any]:
        return {name: next(s.fetch([name])[name] for s in self._parts if name in s.arrays) for name in names}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_alone_gives_the_features_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", vision(kind))
    source, model = open_source(folder), load(folder)
    params, pixels = whole(source)["vision"], batch(ROWS)["vision.pixels"]
    definition = source.models["vision"].module(jnp.float32)
    carry = definition.first.apply(params["first"], {}, {"vision.pixels": jnp.asarray(pixels)}, ONE_DEVICE)
    for i, layer in enumerate(definition.layers):
        carry = layer.apply(layer_params(definition, params["layers"], i), carry, {}, ONE_DEVICE)
    with torch.no_grad():
        inputs = torch.tensor(pixels.transpose(0, 3, 1, 2).copy())
        expected = model(inputs, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(np.asarray(carry["x"]), expected.numpy(), atol=1e-5)


def test_a_state_dict_for_torch_has_the_tensors_of_the_folder(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", text("qwen2", **TIED), dtype=ml_dtypes.bfloat16)
    assert convert.main(["to_torch", str(folder), "--out", str(tmp_path / "a.pt")]) == 0
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    expected = safetensors.load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())
