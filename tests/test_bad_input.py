"""What a user gets wrong is refused before anything compiles, in one line: setting, value, rule and way out.

Through the real commands. What single classes refuse is tested with them (test_layout, test_optimizer, test_config).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import ROOT, Reference, layouts, settings

from hetjax import train, verify
from hetjax.core import memory
from hetjax.core.memory import DeviceMemory
from hetjax.core.trainer import Trainer
from hetjax.run import config, experiment, record
from hetjax.run.checkpoint import Checkpoints

TWO = Reference("[@vision/experiment.Encoder(), @vision/experiment.Encoder()]")


@pytest.fixture(scope="module")
def gin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.gin; beside it a run's record and checkpoint of step 0 in saved/, and broken data in odd/."""
    directory = tmp_path_factory.mktemp("bad")
    gin = runs.write(directory)
    run = runs.load(gin, {})
    trainer = experiment.build(run)
    with Checkpoints(directory / "saved" / "checkpoints") as checkpoints, experiment.train_loader(run) as loader:
        checkpoints.save(trainer, trainer.init(), loader.state())
    record.write(directory / "saved", {record.OPERATIVE: config.operative(run)}, None)
    shutil.copytree(directory / "train", directory / "odd")
    (directory / "odd" / "empty.json").write_text("[]")
    (directory / "odd" / "broken.json").write_text('[{"id": 3,')
    return gin


@pytest.fixture
def refusal(gin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    """A function: settings and work directory -> the message that `hetjax.train` ends with, before it compiles."""

    def refuse(changes: runs.Changes, workdir: str = "new", file: str = "run.gin") -> str:
        filled = {k: v.replace("DIR", str(gin.parent)) if type(v) is str else v for k, v in changes.items()}
        status = train.main(runs.arguments(gin.parent / file, gin.parent / workdir, filled))
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, (status, error)
        return error

    def compile(*_: Any, **__: Any) -> None:
        raise AssertionError("it compiles")

    monkeypatch.setattr(Trainer, "compile", compile)
    return refuse


def model(**changes: Any) -> runs.Changes:
    return {f"decoder.Decoder.{name}": value for name, value in changes.items()}


def vit(**changes: Any) -> runs.Changes:
    return {f"vit.ViT.{name}": value for name, value in changes.items()}


def encoder(**changes: Any) -> runs.Changes:
    return {f"vision/experiment.Encoder.{name}": value for name, value in changes.items()}


def optimizer(**changes: Any) -> runs.Changes:
    return {f"optimizer.OptimizerConfig.{name}": value for name, value in changes.items()}


def data(**changes: Any) -> runs.Changes:
    return {f"train/settings.DataConfig.{name}": value for name, value in changes.items()}


MISWRITTEN = [
    (
        settings(stps=3),
        "--gin.experiment.Experiment.stps=3: experiment.Experiment has no field stps; did you mean steps?",
    ),
    ({"experimnt.Experiment.steps": 3}, "experimnt is not imported; did you mean experiment?"),
    ({"experiment.Experimant.steps": 3}, "experiment has no Experimant; did you mean Experiment?"),
    ({"visoin/layout.Layout.tp": 2}, "visoin/layout.Layout.tp is never used: "),
    ({"vision/decoder.Decoder.width": 2}, "vision/decoder.Decoder.width is never used: "),
    (settings(steps="ten"), "experiment.Experiment.steps = 'ten', but it must be int"),
    (settings(steps=1.5), "experiment.Experiment.steps = 1.5, but it must be int"),
    (settings(tensorboard=1), "experiment.Experiment.tensorboard = 1, but it must be bool"),
    (settings(llm=Reference("@vision/experiment.Encoder()")), "but it must be LanguageModel"),
    (settings(encoders=Reference("@vision/experiment.Encoder()")), "but it must be tuple"),
    (encoder(model=Reference("@decoder.Decoder()")), "encoder.model is a Decoder; it must be a vision or audio model"),
    (
        {"llm/experiment.LanguageModel.model": Reference("@vit.ViT()")},
        "llm.model is a ViT; it must be a language model, such as",
    ),
]
NUMBERS = [
    (settings(steps=0), "Experiment.steps=0; it must be at least 1"),
    (settings(num_microbatches=-1), "Experiment.num_microbatches=-1; it must be at least 1"),
    (settings(save_every=0), "Experiment.save_every=0; it must be at least 1"),
    (settings(keep=0), "Experiment.keep=0; it must be at least 1"),
    (settings(log_every=0), "Experiment.log_every=0; it must be at least 1"),
    (settings(eval_microbatches=-1), "Experiment.eval_microbatches=-1; it must be at least 0"),
    (settings(emulated_devices=-8), "Experiment.emulated_devices=-8; it must be at least 0"),
    (settings(eval_every=5), "Experiment.eval_every=5 without held-out data; set Experiment.held_out"),
    (settings(encoder_window=0), "encoder_window=0 is outside of 1 to num_microbatches=2; None means all of them"),
    (settings(encoder_window=3), "encoder_window=3 is outside of 1 to num_microbatches=2; None means all of them"),
    (settings(schedule="zb"), "Experiment.schedule='zb'; it must be one of 1f1b, gpipe, zerobubble"),
    (settings(param_dtype="bfloat16"), "Experiment.param_dtype='bfloat16'; it must be one of float32, float64"),
    (encoder(remat="some"), "vision.remat='some'; it must be one of none, dots, full, auto"),
    (encoder(compute_dtype="float16"), "vision.compute_dtype='float16'; it must be one of bfloat16, float32, float64"),
    ({"llm/experiment.LanguageModel.remat": "all"}, "llm.remat='all'; it must be one of none, dots, full, auto"),
]
MODULES = [
    (vit(output_width=32), "vision: its output has 32 features, llm takes 16; set vision's output_width to 16"),
    (settings(encoders=TWO), "the name 'vision' is used 2 times; give each its own name"),
    (encoder(name="llm"), "the name 'llm' is used 2 times; give each its own name"),
    (encoder(resampling="cubic"), "vision: resampling='cubic'; it must be one of bicubic, bilinear"),
    (encoder(name="my eyes"), "'my eyes' is not a valid name; use letters, digits and underscores"),
    (
        optimizer(frozen=["llm/layer/*"]),
        "OptimizerConfig.frozen: 'llm/layer/*' matches no parameter; the nearest is 'llm/",
    ),
    (optimizer(trainable=["projector"]), "OptimizerConfig.trainable: 'projector' matches no parameter; the nearest is"),
    (optimizer(frozen=["*"]), "OptimizerConfig.frozen=['*'] freezes every parameter; name what trains in `trainable`"),
    (
        optimizer(learning_rate_multipliers={"audio/*": 2.0}),
        "learning_rate_multipliers: 'audio/*' matches no parameter",
    ),
    (optimizer(learning_rate=-1.0), "OptimizerConfig.learning_rate=-1.0; it must be finite and not negative"),
    (model(num_kv_heads=3), "Decoder.num_heads=4 is not a multiple of num_kv_heads=3"),
    (vit(patch_size=9), "ViT.image_size=8 holds no patch of patch_size=9; make it that or more"),
]
LAYOUTS = [
    (
        layouts(llm=dict(dp=3)),
        "llm: dp=3 does not divide the microbatch's groups=4; set groups to a multiple of 3, or dp to",
    ),
    (
        layouts(vision=dict(dp=5)),
        "vision: dp=5 does not divide the microbatch's 8 item slots (groups x slots_per_group)",
    ),
    (
        layouts(llm=dict(cp=4)) | {"settings.DataConfig.seq_len": 20},
        "llm: cp=4 cuts the sequence into 8 chunks (zig-zag), which do not divide",
    ),
    (
        model(num_heads=6, num_kv_heads=3, head_dim=4),
        "llm: of tp=2 and kv_heads=3 neither divides the other; use tp of 1, 3, 6",
    ),
    (layouts(vision=dict(tp=4)), "vision: tp=4 does not divide heads=2; use tp of 1, 2"),
    (layouts(llm=dict(pp=3)), "llm: pp=3 stages for 2 layers; use pp of at most 2"),
    (
        layouts(llm=dict(pp=2, layers=(2, 1))),
        "llm: Layout.layers=[2, 1] must be pp=2 counts of at least 1 that add up to 2",
    ),
    (
        layouts(llm=dict(tp=2, devices="7-8")),
        "llm: tp=2 stands on device 8, but there are 8 (0 to 7); use fewer devices",
    ),
    (layouts(llm=dict(dp=2, devices="0-2")), "llm: dp=2 needs 2 devices, Layout.devices names 3; name 2, or change"),
    (layouts(vision=dict(dp=2, devices="0,0")), "vision: Layout.devices names device 0 2 times; name each device once"),
    (
        layouts(vision=dict(dp=2, devices="0:1")),
        "Layout.devices='0:1': '0:1' is neither a number nor a range; write '0-3,6'",
    ),
    (layouts(vision=dict(tp=0)), "Layout.tp=0; it must be a whole number of at least 1"),
    (layouts(vision=dict(cp=3)), "vision: cp=3 does not divide tokens=4; use cp of 1, 2, 4"),
    (
        layouts(vision=dict(cp=2)) | vit(variant="clip"),
        "vision: cp=2, but the model's code does not handle cp (it handles copies, dp, pp, tp); set cp=1",
    ),
]
DATA = [
    (
        model(vocab_size=28),
        "llm: vocab_size=28, but the tokenizer DIR/train/tokenizer.json has 30 tokens; set vocab_size to",
    ),
    (data(path="DIR/none/gone.json"), "DataConfig.path='DIR/none/gone.json': No such file or directory; name a file"),
    (data(path="DIR/odd/gone.json"), "DataConfig.path='DIR/odd/gone.json': No such file or directory; name a file"),
    (data(path="DIR/train"), "DataConfig.path='DIR/train'; it must name a .json or .jsonl file of conversations"),
    (data(path="DIR/odd/empty.json"), "DIR/odd/empty.json holds no conversation; a run needs at least one"),
    (data(path="DIR/odd/broken.json"), "DIR/odd/broken.json is not JSON: "),
    (data(tokenizer="DIR/none.json"), "no tokenizer at DIR/none.json; set DataConfig.tokenizer to a Hugging Face"),
    (data(tokenizer="DIR/run.gin"), "DIR/run.gin is not a Hugging Face tokenizer.json: "),
    (
        encoder(slots_per_group=1),
        "has 2 pictures for vision, but slots_per_group=1: no group can hold it; raise slots_per",
    ),
    (encoder(slots_per_group=0), "vision: slots_per_group=0; it must be at least 1"),
    (encoder(std=(0.5, 0.0, 0.5)), "vision: std=(0.5, 0.0, 0.5); pixels are divided by it, so each must be above 0"),
    (
        {"settings.DataConfig.seq_len": 4},
        "DataConfig.seq_len=4 is too short: one picture of vision takes up to 4 positions, with a question and an",
    ),
    (data(groups=0), "DataConfig.groups=0; it must be at least 1"),
    (
        encoder(field="plot") | data(on_bad_item="stop"),
        "; repair it, or set DataConfig.on_bad_item='skip' to go on",
    ),
]
CHECKPOINT = [
    (
        model(mlp_width=64),
        "llm/model/decoder.Decoder.mlp_width = 64, which was 32: DIR/saved/checkpoints/0: ",
    ),
    (
        model(mlp_width=64),
        "layers/0000/mlp/down has shape [32, 16], this run's is [64, 16]; restore with the model's own sizes",
    ),
    (
        model(num_layers=3),
        "layers/0002/attention/k: the checkpoint lacks it; restore with the model and optimizer settings",
    ),
    (optimizer(name="sgd", momentum=0.9), "this run has no such array; restore with the model and optimizer settings"),
    (optimizer(name="sgd"), "error: optimizer/optimizer.OptimizerConfig.name = 'sgd', which was 'adamw': DIR/saved/"),
    (
        optimizer(frozen=["vision/*"]),
        "optimizer/vision/0/count: this run has no such array; restore with the model and",
    ),
    (data(path="DIR/held_out/data.json"), "the saved data position has file="),
    (
        data(seed=1),
        "the saved data position has seed=0, this run 1: it would continue in another order; resume with the same",
    ),
    (
        data(shuffle=False),
        "the saved data position has shuffle=True, this run False: it would continue in another order; resu",
    ),
]


@pytest.mark.parametrize(("changes", "message"), [*MISWRITTEN, *NUMBERS, *MODULES, *LAYOUTS, *DATA], ids=str)
def test_a_wrong_setting_is_refused(refusal: Any, gin: Path, changes: runs.Changes, message: str) -> None:
    assert message.replace("DIR", str(gin.parent)) in refusal(changes)


@pytest.mark.parametrize(("changes", "message"), CHECKPOINT, ids=str)
def test_a_run_that_does_not_fit_its_checkpoint_is_refused(
    refusal: Any, gin: Path, changes: runs.Changes, message: str
) -> None:
    assert message.replace("DIR", str(gin.parent)) in refusal(changes, "saved")


def test_a_refused_run_writes_no_record(refusal: Any, gin: Path) -> None:
    """Neither of itself in a new directory, nor over that of the run which is there."""
    refusal(settings(steps=0), "fresh")
    assert "Experiment.init_from: llm: nosuch: no such directory" in refusal(
        settings(init_from={"llm": "nosuch"}), "fresh"
    )
    assert not (gin.parent / "fresh").exists()
    saved = gin.parent / "saved" / "config.gin"
    saved.write_text("of the first run")
    for changes in (settings(steps=0), layouts(llm=dict(tp=3)), model(mlp_width=64), data(seed=1)):
        refusal(changes, "saved")
    assert saved.read_text() == "of the first run"
    assert sorted(p.name for p in saved.parent.iterdir()) == ["checkpoints", "config.gin", record.OPERATIVE]


def test_a_work_directory_that_cannot_be_written_is_refused(refusal: Any, gin: Path) -> None:
    assert f"--workdir={gin}: File exists; name a directory that can be written" in refusal({}, "run.gin")
    assert f"--workdir={gin}/a: Not a directory; name a directory that can be written" in refusal({}, "run.gin/a")


def test_a_gin_file_that_is_not_there_or_is_none_is_refused(refusal: Any, gin: Path) -> None:
    assert f"no such gin file: {gin.parent}/rum.gin; did you mean run.gin?" in refusal({}, file="rum.gin")
    assert f"{gin.parent}/train cannot be read: Is a directory; name a gin file" in refusal({}, file="train")
    (gin.parent / "empty.gin").write_text("")
    assert "experiment.Experiment needs a value for llm: bind experiment.Experiment.llm" in refusal(
        {}, file="empty.gin"
    )


def test_a_wrong_gin_file_is_named_with_its_line(refusal: Any, gin: Path) -> None:
    lines = gin.read_text().replace("vit.ViT.patch_size = 4", "vit.ViT.patch_size = 0")
    (gin.parent / "zero.gin").write_text(lines)
    number = lines.splitlines().index("vit.ViT.patch_size = 0") + 1
    assert f"zero.gin:{number}: ViT.patch_size=0; it must be a whole number of at least 1" in refusal(
        {}, file="zero.gin"
    )


def test_the_command_line_ends_with_one_line_and_status_2(gin: Path) -> None:
    """Also fewer emulated devices than the layouts need, which takes a fresh process."""
    arguments = runs.arguments(gin, gin.parent / "new", settings(emulated_devices=4))
    line = [sys.executable, "-m", "hetjax.train", *arguments]
    ran = subprocess.run(line, env=runs.environment(), cwd=ROOT, capture_output=True, text=True, timeout=100)
    rule = "llm: cp=2 x tp=2 stands on device 4, but there are 4 (0 to 3); use fewer devices, or emulate more"
    way = "(emulated_devices; under hetjax launch --devices-per-process)"
    assert (ran.returncode, ran.stderr) == (2, f"error: {rule} {way}\n")


def test_verify_is_as_strict(gin: Path, capsys: pytest.CaptureFixture) -> None:
    for flag, rule in (
        ("--steps=0", "--steps=0; compare at least 1"),
        ("--gin.vit.ViT.width=3", "ViT.width=3 is not a mu"),
    ):
        assert verify.main([f"--gin_file={gin}", flag]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and rule in error and error.count("\n") == 1


def test_a_run_that_does_not_fit_its_devices_is_refused() -> None:
    needed = {0: DeviceMemory(1 << 30, 0, 0, 0, 0), 1: DeviceMemory(1 << 30, 1 << 30, 0, 0, 1)}
    memory.check(needed, {0: 1 << 30, 1: (2 << 30) + 1})
    memory.check(needed, {})
    message = (
        "device 1: the run needs 2.00 GiB, the device has 1.00 GiB; use fewer samples a group, remat='full', "
        "Layout.offload, or more devices"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        memory.check(needed, {0: 1 << 30, 1: 1 << 30})
