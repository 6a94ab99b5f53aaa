"""gin files become dataclasses; every mistake in one is an error that says where it is and what was meant."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from hetjax.run import config
from hetjax.run.ginfile import ConfigError


@dataclasses.dataclass(frozen=True)
class Layout:
    dp: int = 1
    tp: int = 1
    devices: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise ValueError(f"layout: dp={self.dp}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class ViT:
    width: int
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Encoder:
    model: Any
    layout: Layout = Layout()
    name: str = "vision"


def constant(step: int) -> float:
    return 1.0


@dataclasses.dataclass(frozen=True)
class Experiment:
    llm: Encoder
    encoders: tuple[Encoder, ...] = ()
    steps: int = 10
    rate: float = 0.1
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    window: int | None = None
    tensorboard: bool = False
    curve: Callable[[int], float] | None = None
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


BASE = """
import test_config
from models import axes, contract as parts

WIDTH = 64  # of every model
test_config.Experiment.llm = @llm/test_config.Encoder()
test_config.Experiment.encoders = [@vision/test_config.Encoder(), @audio/test_config.Encoder()]
test_config.Encoder.model = @test_config.ViT()
test_config.ViT.width = %WIDTH
vision/test_config.Encoder.layout = @vision/test_config.Layout()
vision/test_config.Layout.dp = 4
audio/test_config.Encoder.name = 'audio'
audio/test_config.ViT.width = 32
llm/test_config.Encoder.model = @llm/axes.Axis()
llm/axes.Axis.names = ('tp',)
llm/axes.Axis.size = %WIDTH
"""
EXPECTED = Experiment(
    llm=Encoder(model=None),
    encoders=(Encoder(ViT(64), Layout(dp=4)), Encoder(ViT(32), name="audio")),
)


def load(tmp_path: Path, text: str, *bindings: str) -> Experiment:
    path = tmp_path / "run.gin"
    path.write_text(text)
    return config.load([str(path)], bindings, Experiment)


def same(got: Experiment, **changes: Any) -> bool:
    """Whether `got` is what BASE says, with `changes`."""
    return dataclasses.replace(got, llm=EXPECTED.llm) == dataclasses.replace(EXPECTED, **changes)


def test_a_file_becomes_a_dataclass(tmp_path: Path) -> None:
    got = load(tmp_path, BASE)
    assert same(got)
    assert (got.llm.model.names, got.llm.model.size) == (("tp",), 64)


def test_settings_of_the_command_line_win_and_the_last_of_them(tmp_path: Path) -> None:
    got = load(
        tmp_path,
        BASE,
        "test_config.Experiment.steps = 5",
        "test_config.Experiment.steps = 7",
        "vision/test_config.Layout.tp = 2",
        "WIDTH = 16",
    )
    assert (got.steps, got.llm.model.size) == (7, 16)
    assert got.encoders[0] == Encoder(ViT(16), Layout(4, 2)) and got.encoders[1].model == ViT(32)


@pytest.mark.parametrize("text", ["tower", "0-3", "0-3,6", "data/a.json", "/a/b c", "<image>", "1e-3x"])
def test_text_of_the_command_line_needs_no_quotes(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, BASE, f"vision/test_config.Encoder.name = {text}").encoders[0].name == text


def test_the_command_line_may_stand_before_all_uses_of_a_files_binding(tmp_path: Path) -> None:
    base = BASE.replace("vision/test_config.Layout.dp = 4", "test_config.Layout.dp = 4")
    assert same(load(tmp_path, base, "vision/test_config.Layout.dp = 4", "test_config.Experiment.rate = 0.1"))
    widths = ["test_config.ViT.width = 8", "llm/axes.Axis.size = 64"]  # nothing is %WIDTH now
    assert load(tmp_path, BASE, *widths).encoders[0].model == ViT(8)
    scoped = ["vision/test_config.ViT.width = 8", "llm/axes.Axis.size = 64"]  # nor here
    assert load(tmp_path, BASE, *scoped).encoders[0].model == ViT(8)


def test_what_files_set_for_a_value_that_the_command_line_replaces_is_not_missed(tmp_path: Path) -> None:
    none = "test_config.Experiment.encoders = []"
    assert same(load(tmp_path, BASE, none), encoders=())
    deeper = BASE.replace("dp = 4", "devices = %DEVICES") + "DEVICES = [0]"
    assert same(load(tmp_path, deeper, none), encoders=())
    with pytest.raises(ConfigError, match=r"vision/test_config.Layout.tp is never used"):
        load(tmp_path, BASE, none, "vision/test_config.Layout.tp = 2")
    with pytest.raises(ConfigError, match=r"vision/test_config.Layout.dp is never used.* did you mean vison/"):
        load(tmp_path, BASE, "vision/test_config.Encoder.layout = @vison/test_config.Layout()")
    with pytest.raises(ConfigError, match=r"run.gin:\d+: test_config.Encoder.model is never used"):
        load(tmp_path, BASE + none)


def test_an_include_is_found_beside_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.gin").write_text(BASE)
    (tmp_path / "base" / "all.gin").write_text(
        "import test_config\ninclude 'model.gin'\ntest_config.Experiment.steps = 3"
    )
    monkeypatch.chdir("/")
    text = "import test_config as t\nt.Experiment.rate = 1\ninclude 'base/all.gin'\nt.Experiment.window = 2"
    got = load(tmp_path, text, "test_config.Experiment.tensorboard = True")
    assert same(got, steps=3, rate=1.0, window=2, tensorboard=True)


def test_later_lines_win_over_an_include_and_it_over_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "base.gin").write_text(BASE + "test_config.Experiment.steps = 3\ntest_config.Experiment.window = 3\n")
    text = "import test_config as t\nt.Experiment.steps = 1\ninclude 'base.gin'\nt.Experiment.window = 4"
    assert same(load(tmp_path, text), steps=3, window=4)


def test_values_take_the_declared_type(tmp_path: Path) -> None:
    got = load(
        tmp_path,
        BASE,
        "test_config.Experiment.rate = 2",
        "test_config.Experiment.extra = {'a': 1, 'b': 2.5}",
        "vision/test_config.Layout.devices = [0, 4]",
        "test_config.Experiment.curve = @test_config.constant",
        "test_config.Experiment.schedule = 'gpipe'",
    )
    assert type(got.rate) is float and got.rate == 2.0
    assert type(got.extra["a"]) is float and got.extra == {"a": 1.0, "b": 2.5}
    assert got.encoders[0].layout.devices == (0, 4) and isinstance(got.encoders, tuple)
    assert got.curve is not None and got.curve.__name__ == "constant"
    hash(got.encoders)


def test_blocks_and_the_header_of_dynamic_registration_are_read(tmp_path: Path) -> None:
    block = "test_config.Experiment:\n  steps = 4\n  rate = 0.5\n"
    got = load(tmp_path, f"from __gin__ import dynamic_registration\n{BASE}{block}")
    assert same(got, steps=4, rate=0.5)


def test_an_unscoped_reference_stays_in_the_scope_of_its_user(tmp_path: Path) -> None:
    assert load(tmp_path, BASE).encoders[1].model == ViT(32)  # by audio/ViT.width, through the unscoped Encoder.model


@pytest.mark.parametrize(
    "bindings",
    [
        (),
        (
            "test_config.Experiment.extra = {'a': 1e-08}",
            "test_config.Experiment.curve = @test_config.constant",
            "vision/test_config.Layout.devices = (0, 4)",
            "test_config.Experiment.schedule = 'gpipe'",
            'audio/test_config.Encoder.name = "it\'s \\"audio\\"\\n"',
        ),
    ],
)
def test_the_operative_file_makes_the_same_experiment(tmp_path: Path, bindings: tuple[str, ...]) -> None:
    first = load(tmp_path, BASE, *bindings)
    text = config.operative(first)
    assert load(tmp_path, text) == first
    assert config.operative(load(tmp_path, text)) == text
    assert "test_config.Experiment.steps = 10" in text.splitlines()  # a default, written out
    assert "encoders_0/layout/test_config.Layout.dp = 4" in text.splitlines()


def test_the_operative_file_keeps_containers_as_they_are(tmp_path: Path) -> None:
    made = Experiment(Encoder([1, (2,), (), [], {"deep": [Layout(dp=2), (ViT(3), None)]}]))
    assert load(tmp_path, config.operative(made)) == made


def test_the_operative_file_keeps_modules_of_the_same_name_apart() -> None:
    def holds(module: str) -> Any:
        made = dataclasses.make_dataclass("Holds", [("x", Any)], frozen=True)
        made.__module__ = module
        return made

    text = config.operative(holds("a.layers")(holds("b.layers")(3)))
    assert text.split("\n\n")[0].splitlines() == ["from a import layers", "import b.layers as b_layers"]
    assert "layers.Holds.x = @x/b_layers.Holds()\nx/b_layers.Holds.x = 3" in text


@pytest.mark.parametrize("value", [b"x", lambda: 0, (lambda: 0,)])
def test_a_value_without_a_name_is_written_as_a_comment(value: Any) -> None:
    text = config.operative(Experiment(Encoder(value)))
    (line,) = [line for line in text.splitlines() if ".model" in line]
    assert line.startswith("# llm/") and "made at run time has no name that a gin file could write" in line


LINES = BASE.count("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("test_config.Layot.dp = 2", r"run.gin:LINE: test_config has no Layot; did you mean Layout\?"),
        ("test_confg.Layout.dp = 2", r"run.gin:LINE: test_confg is not imported; did you mean test_config\?"),
        (
            "test_config.Experiment.step = 2",
            r"run.gin:LINE: test_config.Experiment has no field step; did you mean steps",
        ),
        (
            "visoin/test_config.Layout.tp = 2",
            r"run.gin:LINE: visoin/test_config.Layout.tp is never used: nothing builds it in that scope; "
            r"did you mean vision/test_config.Layout.tp\?",
        ),
        (
            "llm/test_config.Layout.tp = 2",
            r"run.gin:LINE: llm/test_config.Layout.tp is never used: nothing builds it in",
        ),
        ("llm/test_config.ViT.width = 2", r"run.gin:LINE: llm/test_config.ViT.width is never used"),
        ("axes.Axes.dp = @axes.Axis()", r"run.gin:LINE: axes.Axes.dp is never used: nothing builds it"),
        (
            "test_config.Encoder.name = 'x'\nvision/test_config.Encoder.name = 'v'\nllm/test_config.Encoder.name = 'l'",
            r"run.gin:LINE: test_config.Encoder.name is never used: an inner scope sets it wherever it is built",
        ),
        ("HEIGHT = 3", r"run.gin:LINE: HEIGHT is never used: no value is %HEIGHT"),
        ("test_config.Experiment.steps = %WIDHT", r"run.gin:LINE: %WIDHT is set nowhere; did you mean WIDTH\?"),
        (
            "test_config.Experiment.curve = @test_config.constnt",
            r"run.gin:LINE: test_config has no constnt; did you mean c",
        ),
        (
            "test_config.Experiment.steps = 'ten'",
            r"run.gin:LINE: test_config.Experiment.steps = 'ten', but it must be int",
        ),
        ("test_config.Experiment.steps = 1.5", r"run.gin:LINE: .*steps = 1.5, but it must be int"),
        ("test_config.Experiment.steps = True", r"run.gin:LINE: .*steps = True, but it must be int"),
        ("test_config.Experiment.rate = True", r"run.gin:LINE: .*rate = True, but it must be finite float"),
        ("test_config.Experiment.rate = 1e999", r"run.gin:LINE: .*rate = inf, but it must be finite float"),
        (f"test_config.Experiment.rate = {10**400}", r"run.gin:LINE: .*rate = 1000*, but it must be finite float"),
        ("test_config.Experiment.tensorboard = 1", r"run.gin:LINE: .*tensorboard = 1, but it must be bool"),
        ("test_config.Experiment.window = '3'", r"run.gin:LINE: .*window = '3', but it must be int \| None"),
        ("test_config.Experiment.schedule = '2f2b'", r"run.gin:LINE: .*schedule = '2f2b', but it must be .*'gpipe'"),
        (
            "test_config.Experiment.extra = {'a': 'b'}",
            r"run.gin:LINE: .*extra = {'a': 'b'}, but it must be dict\[str, finite float",
        ),
        ("test_config.Experiment.encoders = [3]", r"run.gin:LINE: .*encoders = \[3\], but it must be tuple"),
        (
            "vision/test_config.Layout.devices = (1, 2, 3)",
            r"run.gin:LINE: .*devices = \(1, 2, 3\), but it must be tuple",
        ),
        (
            "vision/test_config.Encoder.layout = @vision/test_config.ViT()",
            r"run.gin:LINE: .*layout = @vision/test_config.ViT\(\), but it must be Layout",
        ),
        ("vision/test_config.Layout.dp = 0", r"run.gin:LINE: layout: dp=0; it must be at least 1"),
        (
            "test_config.Experiment.llm = @big/axes.Axis()",
            r"run.gin:LINE: .*llm = @big/axes.Axis\(\), but it must be Encoder",
        ),
        (
            "llm/test_config.Encoder.model = @test_config.Encoder()",
            r"a reference or macro leads back to itself",
        ),
        (
            "test_config.Experiment.schedule = gpipe",
            r"run.gin:LINE: gpipe is not a value; a string needs quotes: 'gpipe'",
        ),
        ("test_config.Experiment.steps 3", r"run.gin:LINE: Couldn't parse statement, expected ':' or '='"),
        ("test_config.Experiment.extra = {'a': ", r"run.gin:\d+: "),
        ("include 'bsae.gin'", r"run.gin:LINE: no such gin file: .*bsae.gin; did you mean base.gin\?"),
        ("from hetjax.core import layuot", r"run.gin:LINE: no module named hetjax.core.layuot; did you mean layout\?"),
        ("from hetjx import layout", r"run.gin:LINE: no module named hetjx; did you mean hetjax\?"),
        ("from models.axes import Axis", r"run.gin:LINE: gin imports modules: import models.axes and write axes.Axis"),
        ("from models import (axes,", r"run.gin:LINE: not an import of modules on one line"),
        ("axes.ONE_DEVICE.dp = 3", r"run.gin:LINE: axes.ONE_DEVICE is not a class or a function"),
    ],
)
def test_a_mistake_names_its_line_and_what_was_meant(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "base.gin").write_text("")
    with pytest.raises(ConfigError, match=message.replace("LINE", str(LINES + 1))):
        load(tmp_path, BASE + line + "\n")


@dataclasses.dataclass(frozen=True)
class Heads:
    heads: int
    kv: int = 1
    other: int = 0

    def __post_init__(self) -> None:
        raise ValueError(f"Heads.heads={self.heads} is not a multiple of kv={self.kv}, whatever other settings are")


def test_an_error_of_two_settings_names_the_lines_of_both(tmp_path: Path) -> None:
    path = tmp_path / "run.gin"
    lines = ["import test_config", *(f"test_config.Heads.{name} = 4" for name in ("other", "kv"))]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as raised:
        config.load([path], ["test_config.Heads.heads = 6"], Heads)
    assert str(raised.value).startswith(f"{path}:3, --gin.test_config.Heads.heads=6: Heads.heads=6 is not a multiple")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "test_config.Experiment.steps = ten",
            r"--gin.test_config.Experiment.steps=ten: .*steps = 'ten', but it .* int",
        ),
        ("test_config.Experiment.rate = nan", r"--gin.*rate=nan: .*rate = 'nan', but it must be finite float"),
        ("test_config.Experiment.schedule = 2f2b", r"--gin.test_config.Experiment.schedule=2f2b: .*'gpipe'"),
        (
            "llm/test_config.Encoder.model = ViT",
            r"--gin.llm/test_config.Encoder.model=ViT: ViT is not a value; a string",
        ),
        ("llm/test_config.Encoder.model = @tower", r"tower is not imported"),
        ("llm/test_config.Encoder.model = 'tower", r"--gin.llm/test_config.Encoder.model='tower: "),
        ("WIDTH = wide", r"Axis.size = %WIDTH, but it must be int"),
        (
            "test_config.Experiment.stps = 1",
            r"--gin.test_config.Experiment.stps=1: .* no field stps; did you mean steps\?",
        ),
        (
            "visio/test_config.Layout.dp = 2",
            r"--gin.visio/test_config.Layout.dp=2: .* did you mean vision/test_config.Lay",
        ),
        ("vision/test_config.Layout.dp = -1", r"--gin.vision/test_config.Layout.dp=-1: layout: dp=-1; it must be"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_setting(tmp_path: Path, binding: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, BASE, binding)


def test_a_mistake_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "base.gin").write_text("import test_config\n\ntest_config.Experiment.lm = 3\n")
    with pytest.raises(ConfigError, match=r"base.gin:3: test_config.Experiment has no field lm; did you mean llm\?"):
        load(tmp_path, "include 'base.gin'\n")


def test_a_missing_file_and_a_missing_value_are_errors(tmp_path: Path) -> None:
    (tmp_path / "quickstart.gin").write_text("")
    with pytest.raises(ConfigError, match=r"^no such gin file: .*quickstrt.gin; did you mean quickstart.gin\?"):
        config.load([str(tmp_path / "quickstrt.gin")], [], Experiment)
    with pytest.raises(ConfigError, match=r"needs a value for llm: bind test_config.Experiment.llm"):
        load(tmp_path, "")
    with pytest.raises(
        ConfigError, match=r"run.gin:2: test_config.Encoder needs a value for model: bind llm/test_config"
    ):
        load(tmp_path, "import test_config\ntest_config.Experiment.llm = @llm/test_config.Encoder()")


def test_an_import_that_fails_inside_is_not_taken_for_a_misspelt_name(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_module.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load(tmp_path, "import broken_module")
