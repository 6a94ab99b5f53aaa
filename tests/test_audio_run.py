"""One run that sees and hears: a Whisper's encoder and a fresh vision tower, each in its place, and what it exports."""

import json
from pathlib import Path

import hf_folders
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import soundfile
import test_sounds
from runs import Reference

from hetjax import convert, generate, train
from hetjax.core import flops
from hetjax.hf.stored import open_source
from hetjax.judge.reference import apply_module
from hetjax.run.experiment import Experiment
from hetjax.run.shrink import shrunk
from models.whisper import Whisper

LENGTHS = [(80, 5), (40,), (), (3, 79, 17), (8,), (61, 4)]
SIZES = dict(num_mels=80, width=16, num_layers=2, num_heads=2, mlp_width=24, output_width=16, max_frames=80)
SPEECH = Whisper(**SIZES, variant="qwen2_audio")


def changes(folder: Path, data: str) -> runs.Changes:
    """Those that give the tiny run an audio encoder which starts from a Whisper folder."""
    encoder = {f"whisper.Whisper.{name}": getattr(SPEECH, name) for name in (*SIZES, "variant")}
    encoder["audio/experiment.Encoder.model"] = Reference("@whisper.Whisper()")
    encoder["audio/experiment.Encoder.layout"] = Reference("@audio/layout.Layout()")
    encoder["audio/experiment.Encoder.slots_per_group"] = 3
    encoders = Reference("[@vision/experiment.Encoder(), @audio/experiment.Encoder()]")
    layouts = runs.layouts(audio=dict(dp=2, devices="2-3"), llm=dict(tp=2, devices="4-5"))
    optimizer = {"optimizer.OptimizerConfig.frozen": ("audio/*",)}
    optimizer["optimizer.OptimizerConfig.trainable"] = ("audio/last/projector/*",)
    place = {"train/settings.DataConfig.path": data, "settings.DataConfig.groups": 2, "settings.DataConfig.seq_len": 48}
    run = runs.settings(steps=2, encoders=encoders, init_from={"audio": str(folder)})
    return encoder | layouts | optimizer | place | run


def trained(root: Path) -> Path:
    """The run's workdir; beside it lie run.gin, data and the Whisper folder."""
    (root / "data").mkdir(parents=True)
    config = hf_folders.whisper(num_mel_bins=80, max_source_positions=1500)
    folder = hf_folders.write(root / "whisper", config, dtype=np.float16)
    data = test_sounds.write(root / "data", LENGTHS)
    gin = root / "run.gin"
    gin.write_text(runs.GIN.replace("from models import decoder, vit", "from models import decoder, vit, whisper"))
    assert train.main(runs.arguments(gin, root / "run", changes(folder, data))) == 0
    return root / "run"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("audio"))


def test_both_kinds_are_counted_and_the_frozen_encoder_is_the_folder_s(workdir: Path, tmp_path: Path) -> None:
    for name in ("images_per_second", "clips_per_second", "gradient_norm/audio", "tflops_per_device/audio"):
        assert all(value > 0 for value in runs.records(workdir, name).values()), name
    out = tmp_path / "encoder"
    assert convert.main(["to_hf", str(workdir), "--out", str(out), "--modules=audio"]) == 0
    ours, theirs = hf_folders.read(out), hf_folders.read(workdir.parent / "whisper")
    wanted = {k.removeprefix("model.encoder."): v.astype(np.float32) for k, v in theirs.items() if "encoder." in k[:14]}
    assert not list(hf_folders.differing(ours, wanted))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen2AudioEncoder"]


def test_of_two_encoders_one_is_exported(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["to_hf", str(workdir), "--out", str(tmp_path / "no")]) == 2
    assert "no Hugging Face class holds a Whisper beside llm, vision" in (told := capsys.readouterr().err)
    assert "choose them with --modules (of llm, vision, audio)" in told
    assert convert.main(["to_hf", str(workdir), "--out", str(tmp_path / "no"), "--modules=llm,ears"]) == 2
    assert "--modules names 'ears'" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert convert.main(["to_hf", str(workdir), "--out", str(tmp_path / "llava"), "--modules=llm,vision"]) == 0
    assert json.loads((tmp_path / "llava/config.json").read_text())["model_type"] == "llava"


def test_shrinking_and_flops_know_the_encoder(workdir: Path) -> None:
    run: Experiment = open_source(workdir).run  # type: ignore[attr-defined]
    small = shrunk(run).encoders[1].model
    assert (small.width, small.num_layers, small.context, small.variant) == (16, 2, 80, "qwen2_audio")
    assert small.output_width == shrunk(run).llm.model.width
    parts = flops.forward(SPEECH, rows=2, seq_len=48, items=6)
    assert parts is not None
    counted = flops.total(parts)
    n, d, f, m = 40, 16, 24, 80
    layers = 2 * 2 * n * (4 * d * d + 2 * d * f)
    assert counted.attention == 6 * 2 * 4 * n * n * d
    assert counted.matmul == 6 * (2 * (3 * m * d * 80 + 3 * d * d * n) + layers + 2 * 20 * d * d)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_hears_the_same_from_the_file_to_the_logits(workdir: Path, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from beside_torch import whole
    from in_transformers import load

    out = tmp_path / "qwen2-audio"
    assert convert.main(["to_hf", str(workdir), "--out", str(out), "--modules=llm,audio"]) == 0
    source, model = open_source(workdir), load(out)
    processor = transformers.AutoProcessor.from_pretrained(out)
    files = [workdir.parent / "data" / f"3-{k}.wav" for k in range(3)]
    heard = [soundfile.read(f, dtype="float32")[0] for f in files]
    text = "so <audio> so <audio> so <audio> q3"
    made = processor(text=[text], audio=heard, return_tensors="pt", sampling_rate=16000)
    token = json.loads((out / "config.json").read_text())["audio_token_index"]

    reader = source.run.encoders[1].items.reader  # type: ignore[attr-defined]
    values = [reader.read(f) for f in files]
    batch = {f"audio.{name}": jnp.stack([v[name] for v in values]) for name in ("mel", "frames")}
    tokens = made["input_ids"].numpy().astype(np.int32)
    index = np.full(tokens.shape, -1, np.int32)
    places = [slot * SPEECH.rows + r for slot, f in enumerate(files) for r in range(reader.look(f).rows)]
    index[tokens == token] = places
    batch |= {"tokens": tokens, "audio.index": index, "positions": np.arange(tokens.shape[1])[None].astype(np.int32)}
    batch["segment_ids"] = np.ones_like(tokens)
    models, params = source.models, whole(source)
    rows = apply_module(models["audio"].module(jnp.float32), params["audio"], {}, batch)["x"]
    llm = models["llm"].module(jnp.float32, encoders=("audio",))
    y = apply_module(llm, params["llm"], {"audio": rows}, batch)
    with torch.no_grad():
        expected = model(**made).logits
    np.testing.assert_allclose(np.asarray(y["x"] @ y["head"]), expected.numpy(), atol=1e-5)

    question = {"role": "user", "content": [{"type": "text", "text": text}]}
    asked = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    made = processor(text=[asked], audio=heard, return_tensors="pt", sampling_rate=16000)
    with torch.no_grad():
        said = model.generate(**made, max_new_tokens=32, do_sample=False)[0, made["input_ids"].shape[1] :]
    for place in (out, workdir):  # the folder's chat template and processor, and the run's own
        ours = generate.load(place)
        prompt = generate.ask(text, audio=[str(f) for f in files])
        (answer,) = ours([prompt], max_new_tokens=32)
        if place == out:
            found = generate.prompt.read_items(prompt, ours.chat.items)
            assert ours.chat.encode(prompt, found).tokens == made["input_ids"][0].tolist()
        assert answer.tokens == said.tolist()
