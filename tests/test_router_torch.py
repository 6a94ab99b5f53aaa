"""Losses of routers, their gradients and statistics are those of transformers, with padding masked.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import dataclasses
from pathlib import Path
from typing import Any

import beside_torch
import families
import hf_folders
import jax
import numpy as np
import pytest
from beside_torch import Outcome, in_transformers, torch

from hetjax.hf.stored import open_source
from hetjax.judge import reference

pytestmark = beside_torch.QUIET
BALANCE, Z = 0.3, 0.05
FOLDERS = {
    "mixtral": hf_folders.text("mixtral", output_router_logits=True, router_aux_loss_coef=BALANCE),
    "qwen3_moe, dense layers": hf_folders.text(
        "qwen3_moe",
        **dict(num_hidden_layers=4, mlp_only_layers=[1, 2], norm_topk_prob=True),
        **dict(output_router_logits=True, router_aux_loss_coef=BALANCE),
    ),
}


@pytest.mark.parametrize("family", list(FOLDERS))
def test_loss_gradients_and_loads_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", FOLDERS[family])
    source, model = open_source(folder), in_transformers.load(folder)
    decoder = source.models["llm"]
    assert decoder.experts.balance_loss == BALANCE
    source.models["llm"] = dataclasses.replace(decoder, experts=dataclasses.replace(decoder.experts, z_loss=Z))
    microbatch = padded(families.microbatch(source.models))

    mask = torch.tensor(microbatch["segment_ids"] > 0)
    inputs = {k: torch.tensor(v) for k, v in families.for_transformers(microbatch).items()}
    out = model(**(inputs | {"attention_mask": mask.long()}))
    plain = out.loss - BALANCE * out.aux_loss
    each = torch.cat([layer[mask.reshape(-1)] for layer in out.router_logits])
    total = out.loss + Z * torch.square(torch.logsumexp(each, -1)).mean()
    total.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    expected = Outcome(
        np.where(mask[..., None], out.logits.detach(), 0), total.item(), beside_torch.stored(grads, source)
    )

    got = beside_torch.ours(source, microbatch)
    got = got._replace(output=np.where(mask[..., None], got.output, 0))
    beside_torch.assert_same(got, expected, source)
    assert abs(got.scalar - plain.item()) > 0.1, "the losses are seen"
    chosen = [torch.topk(layer[mask.reshape(-1)], decoder.experts.per_token).indices for layer in out.router_logits]
    loads = [np.bincount(c.reshape(-1), minlength=decoder.experts.count) for c in chosen]
    np.testing.assert_array_equal(routed(source, microbatch), loads)


def padded(microbatch: families.Arrays) -> families.Arrays:
    """The last tokens of the first sample are padding."""
    real = np.ones_like(microbatch["segment_ids"])
    real[0, -6:] = 0
    weights = microbatch["weights"] * np.roll(real, -1, 1)
    return microbatch | dict(segment_ids=real, weights=weights)


def routed(source: Any, microbatch: families.Arrays) -> np.ndarray:
    """Tokens of each expert, by layer."""
    params = jax.tree.map(lambda a: a.astype("float32"), beside_torch.whole(source))
    return np.asarray(reference.loss_and_loads(beside_torch.graph(source.models, {}), 1, params, microbatch)[1]["llm"])


@pytest.mark.parametrize("changes", [{}, dict(n_group=1, topk_group=1)], ids=["best groups", "one group"])
def test_loads_of_a_router_with_a_bias_are_those_of_transformers(changes: dict[str, int], tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", hf_folders.text("dots1", num_hidden_layers=3, **changes))
    source, model = open_source(folder), in_transformers.load(folder)
    microbatch = families.microbatch(source.models)
    chosen: list[Any] = []
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    for router in routers:
        router.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    model(**{k: torch.tensor(v) for k, v in families.for_transformers(microbatch).items()})
    loads = [np.bincount(c.reshape(-1), minlength=8) for c in chosen]
    np.testing.assert_array_equal(routed(source, microbatch), loads)
    for router in routers:
        assert router.e_score_correction_bias.abs().min() > 0
        router.e_score_correction_bias.zero_()
    chosen.clear()
    model(**{k: torch.tensor(v) for k, v in families.for_transformers(microbatch).items()})
    assert [np.bincount(c.reshape(-1), minlength=8).tolist() for c in chosen] != [load.tolist() for load in loads]
