"""Models of a folder as settings of a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import hf_folders
import pytest
import runs
from hf_folders import llava, text, vision

from hetjax.data import Pictures
from hetjax.hf import initial, pictures, pretrained
from hetjax.hf.stored import open_source
from hetjax.run import config, experiment
from hetjax.run.experiment import Experiment

GIN = """
from hetjax.run import experiment
from hetjax.data import settings
from hetjax.hf import initial, pictures, pretrained

experiment.Experiment.llm = @llm/experiment.LanguageModel()
experiment.Experiment.encoders = [@vision/experiment.Encoder()]
experiment.Experiment.data = @settings.DataConfig()
settings.DataConfig.path = "data.json"
settings.DataConfig.seq_len = 16
settings.DataConfig.samples_per_group = 1
llm/experiment.LanguageModel.model = @pretrained.decoder()
vision/experiment.Encoder.model = @pretrained.encoder()
pretrained.decoder.path = "DIR/llama"
pretrained.encoder.path = "DIR/siglip"
pretrained.encoder.settings = {"output_width": 32, "feature_layer": -2}
"""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    hf_folders.write(tmp_path / "llama", text("llama"))
    hf_folders.write(tmp_path / "siglip", vision("siglip"))
    hf_folders.write(tmp_path / "llava", llava(text("qwen2"), vision("clip")))
    return tmp_path


def test_a_gin_file_takes_models_from_folders_and_the_operative_config_has_their_sizes(folders: Path) -> None:
    path = folders / "run.gin"
    path.write_text(GIN.replace("DIR", str(folders)))
    run = config.load([str(path)], [], Experiment)
    assert run.llm.model == open_source(folders / "llama").models["llm"]
    tower = run.encoders[0].model
    assert (tower.width, tower.output_width, tower.feature_layer) == (16, 32, -2)
    experiment.build(run)
    operative = config.operative(run)
    assert "pretrained" not in operative and "Decoder.vocab_size = 48" in operative
    path.write_text(operative)
    assert config.load([str(path)], [], Experiment) == run


def test_an_encoder_sees_pictures_as_the_folder_s_processor_says(folders: Path) -> None:
    path = folders / "run.gin"
    names = ("mean", "std", "shortest_edge", "pad_to_square", "resampling")
    more = "".join(f"experiment.Encoder.{n} = @pretrained.{n}()\npretrained.{n}.path = 'DIR/siglip'\n" for n in names)
    path.write_text((GIN + more).replace("DIR", str(folders)))
    with pytest.raises(ValueError, match=r"siglip has no preprocessor_config\.json, which says how pictures are read"):
        config.load([str(path)], [], Experiment)
    reader = Pictures(8, 8, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), 9, pad_to_square=True, resampling="bilinear")
    (folders / "siglip" / pictures.FILE).write_text(json.dumps(pictures.write(reader)))
    run = config.load([str(path)], [], Experiment)
    assert run.encoders[0].items.reader == reader
    starts = initial.open_starts(
        experiment.build_graph(run), {"vision": str(folders / "siglip")}, {"vision": run.encoders[0].items.reader}
    )
    assert set(starts) == {"vision"}


def test_settings_from_a_folder_leave_the_number_of_devices_open(folders: Path) -> None:
    code = (
        "import sys, jax; from hetjax.hf import pretrained; pretrained.decoder(sys.argv[1]); "
        "jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices()) == 3"
    )
    subprocess.run([sys.executable, "-c", code, str(folders / "llama")], check=True, env=runs.environment())


def test_the_parts_of_a_vision_language_model_come_with_their_projector(folders: Path) -> None:
    found = open_source(folders / "llava").models
    assert pretrained.decoder(str(folders / "llava")) == found["llm"]
    assert pretrained.encoder(str(folders / "llava")) == found["vision"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("DIR/llama", "DIR/none", "none: no such directory; name a Hugging Face folder"),
        ("DIR/llama", "DIR/siglip", "pretrained.decoder.path='DIR/siglip' holds 0 decoders; name a source with one"),
        ("DIR/siglip", "DIR/llama", "pretrained.encoder.path='DIR/llama' holds 0 encoders; name a source with one"),
        (
            '"output_width": 32, ',
            "",
            "pretrained.encoder.settings lacks output_width: DIR/siglip holds a tower",
        ),
        ('"output_width"', '"output_widht"', "ViT has no field output_widht; did you mean output_width?"),
    ],
)
def test_what_a_folder_does_not_hold_is_refused(folders: Path, old: str, new: str, message: str) -> None:
    path = folders / "run.gin"
    path.write_text(GIN.replace(old, new).replace("DIR", str(folders)))
    with pytest.raises(ValueError, match=re.escape(message.replace("DIR", str(folders)))) as caught:
        config.load([str(path)], [], Experiment)
    assert "run.gin:" in str(caught.value)
