"""Settings as people type and store them: each case has the value that is right, or the error that it ends with."""

import codecs
import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from hetjax import generate
from hetjax.generate import __main__ as answers
from hetjax.run import command, config
from hetjax.run.ginfile import ConfigError

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Wild:
    """A field of each type that settings have."""

    path: str = ""
    root: str | None = None
    devices: str | tuple[int, ...] | None = None
    either: int | str | None = None
    numbers: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    listed: Sequence[str] = ()
    starts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    choice: Literal["gpipe", "2"] = "gpipe"
    count: int = 0
    rate: float = 0.0
    limit: float | None = None
    flag: bool = False
    anything: Any = None
    inner: Inner | None = None


def spelling() -> str:
    return "bilinear"


HEAD = "import test_settings_wild as t\n"
TEXTS = [
    *(
        "a#b.json",
        "#",
        "/data/run (1)/x.json",
        "(1)",
        "()",
        "[1]",
        "[1].json",
        "{x}",
        "{'a': 1}",
        "{[1]: 2}",
        "{@a: 1}",
        "[" * 999,
        "a,b",
        "1 2",
    ),
    *("me@host/a.json", "@home/a.json", "@a", "@x()", "@t.Wild", "100%", "%20/a", "%X", "$HOME/a", "a;b", "a=b", "="),
    *("it's.json", "'half", '"half', 'say "x".json', "'a'#b", "b'x'", "C:\\data\\new.json", "\\", "'\\d", "a\\"),
    *("a b", " a ", "a\tb", "a\nb", "a\nt.Wild.rate = 3", "日本/é.json", "🙂", "\udce9.json", "", "- a", "-a"),
    *("007", "2", "-1", "1e3", "1_000", "0x10", "3.10", "1.", "7a", "a7", "1e999", "None.json", "Nonesuch", "none"),
    *("True", "nan", "...", "lambda: 0", "x if y else z", "0-3", "0-3,6", "<image>", "~x/a"),
]


class Case(NamedTuple):
    """What is typed behind `--gin.t.Wild.`, or stands in files, and what is right: fields, or a pattern of an error."""

    right: Mapping[str, Any] | str
    typed: Sequence[str] = ()
    files: Mapping[str, str | bytes] = {"run.gin": HEAD}
    named: Sequence[str] = ("run.gin",)  # of `files`, by --gin_file


def typed(right: Mapping[str, Any] | str, *settings: str) -> Case:
    return Case(right, settings)


def stored(right: Mapping[str, Any] | str, *named: str, **files: str | bytes) -> Case:
    """Files by their name without .gin; those in `named` (default: run) are given on the command line."""
    return Case(right, (), {f"{n}.gin": t for n, t in files.items()}, [f"{n}.gin" for n in named or ("run",)])


TYPED = [
    *(typed({"path": text}, f"path={text}") for text in (*TEXTS, "None")),
    *(typed({"root": text}, f"root={text}") for text in TEXTS),
    typed({"root": None}, "root=None"),
    typed({"path": "None", "root": "None"}, "path='None'", 'root="None"'),
    typed({"path": " a#b "}, "path=' a#b '"),
    typed({"path": "a\nb"}, r"path='a\nb'"),
    typed({"path": "007"}, "path= 007".replace(" ", "")),
    typed({"devices": "2"}, "devices=2"),
    typed({"devices": (2,)}, "devices=[2]"),
    typed({"devices": (0, 1)}, "devices=(0, 1)"),
    typed({"devices": "0,1"}, "devices=0,1"),
    typed({"devices": None}, "devices=None"),
    typed({"either": 2}, "either=2"),
    typed({"either": "007"}, "either=007"),
    typed({"either": "2"}, "either='2'"),
    typed({"choice": "2"}, "choice=2"),
    typed({"choice": "gpipe"}, "choice=gpipe"),
    typed("choice=1f1b: .*choice = '1f1b', but it must be .*'gpipe'", "choice=1f1b"),
    typed({"path": "bilinear"}, "path=@t.spelling()"),
    typed(r"@t.speling\(\): t has no speling; did you mean spelling\?", "path=@t.speling()"),
    typed({"inner": Inner("a@b")}, "inner=@t.Inner()", "@t.Inner.name=a@b"),
    typed("nowhere is not imported", "inner=@nowhere.Inner()"),
    typed({"names": ("llm/*", "a b#1")}, "names=[llm/*, a b#1]"),
    typed({"names": ("a(1)", "it's", "x,y")}, "names=(a(1), it's, 'x,y',)"),
    typed({"names": ("2", "007", "1.50")}, "names=[2, 007, 1.50]"),
    typed({"listed": ["@a", "None"]}, "listed=[@a, None]"),
    typed({"names": ("*",)}, 'names=("*",)'),
    typed({"names": ()}, "names=[]"),
    typed(r"names=llm/\*: .*names = 'llm/\*', but it must be tuple.* in brackets: \['llm/\*'\]", "names=llm/*"),
    typed(r"numbers=1,2: .*numbers = '1,2', but it must be tuple.* in brackets: \[1,2\]", "numbers=1,2"),
    typed({"numbers": (1, 2)}, "numbers=[1,2]"),
    typed("names=.a.b: .*must be tuple", "names=[a[b"),
    typed({"starts": {"llm": "models/a#1", "vision": "C:\\b"}}, "starts={llm: models/a#1, 'vision': C:\\b}"),
    typed({"starts": {"llm": "2"}}, 'starts={"llm": 2}'),
    typed({"factors": {"llm/*": 0.5, "a": 2.0}}, "factors={llm/*: 0.5, a: 2}"),
    typed("factors={llm: a}: .*factors = .*must be", "factors={llm: a}"),
    typed("starts=llm: .*must be .*Mapping", "starts=llm"),
    *(
        typed(f"{re.escape(setting)}: .*must be .*between two commas .* in quotes", setting)
        for setting in (
            *("starts={llm: /a, b}", "starts={llm: /a, b, vision: /c}", 'starts={"llm": /a, b}', "starts={a}"),
            *("starts={llm: /a,, vision: /b}", "starts={llm: /a, llm: /b}", "starts={llm:}", "starts={: /a}"),
            *("starts={llm: '/a', '/b'}", "starts={llm: '/a}", "starts={llm: '/a' b}", "starts={'a' b: c}"),
            *("names=[llm/*,, x]", "names=[,]", "names=[, a]", "names=[a, 'b' c]", 'names=["a" "b"]'),
            *('names=[x, "a" "b"]', "names=['a", r"names=['\x', b]", "starts={'llm': '/a' '/b'}"),
        )
    ),
    typed({"starts": {"llm": "/a, b"}}, 'starts={llm: "/a, b"}'),
    typed({"starts": {"llm": "/a, b", "vision": "/c:d, e"}}, "starts={llm: '/a, b', \"vision\" : '/c:d, e',}"),
    typed({"starts": {"a, b": "it's", "c": "d:'e, f'"}}, "starts={'a, b': it's, c: d:'e, f'}"),
    typed({"starts": {"llm": 'a", b'}}, r'starts={llm: "a\", b"}'),
    typed({"starts": {}}, "starts={}"),
    typed({"names": ("a", "b, c")}, 'names=[a, "b, c"]'),
    typed({"names": ('a", b', "c")}, r'names=["a\", b", c]'),
    typed({"names": ("a", "", "b")}, "names=[a, '', b]"),
    typed({"path": '"a" "b"'}, 'path="a" "b"'),
    typed({"count": -3, "rate": -0.5}, "count=-3", "rate=-.5"),
    typed({"rate": 1000.0}, "rate=1e3"),
    typed("count=1e3: .*count = 1000.0, but it must be int; write 1000$", "count=1e3"),
    typed("count=: .*count = '', but it must be int", "count="),
    typed("count=007: .*count = '007', but it must be int; write 7$", "count=007"),
    typed("count='10': .*count = '10', but it must be int; write 10$", "count='10'"),
    typed("count=1.5: .*count = 1.5, but it must be int$", "count=1.5"),
    typed("count=inf: .*count = 'inf', but it must be int$", "count=inf"),
    typed("rate='0.1': .*rate = '0.1', but it must be finite float; write 0.1$", "rate='0.1'"),
    typed("limit=none: .*limit = 'none', but it must be finite float . None; write None$", "limit=none"),
    typed({"count": 5}, "count= 5 "),
    typed({"flag": True}, "flag=True"),
    typed({"flag": True}, "flag=true"),
    typed({"flag": False}, "flag=false"),
    typed("flag=1: .*flag = 1, but it must be bool; write True$", "flag=1"),
    typed("flag=yes: .*flag = 'yes', but it must be bool; write True or False$", "flag=yes"),
    typed({"count": 2}, "count=1", "count=2"),
    typed({"anything": 2}, "anything=2"),
    typed("anything=two: two is not a value; a string needs quotes", "anything=two"),
    typed("vison/t.Wild.path is never used", "@vison/t.Wild.path=a"),
    typed({"path": "a#b", "names": ("a#b",)}, "@D=a#b", "path=%D", "names=[%D]"),
    typed({"devices": "2", "count": 2}, "@D=2", "devices=%D", "count=%D"),
    typed({"path": "007"}, "path=%D", "@D=007"),
    typed("D is never used", "@D=3", "path=%E"),
    typed("is not the name of a setting", "@#x=3"),
    typed("is not the name of a setting", "@t.Wild.a b=3"),
    typed("is not the name of a setting", "@=3"),
]
STORED = [
    stored({"count": 1}, run=codecs.BOM_UTF8 + HEAD.encode() + b"t.Wild.count = 1\n"),
    stored({"count": 1, "path": "a"}, run=HEAD.replace("\n", "\r\n") + "t.Wild.count = 1\r\nt.Wild.path = 'a'\r\n"),
    stored({"count": 1}, run=HEAD + "t.Wild.count\t=\t1\t# one"),
    stored({"path": "a#b (1) @%'[]"}, run=HEAD + 't.Wild.path = "a#b (1) @%\'[]"'),
    stored({"path": "\u2028\x0c\x85"}, run=HEAD + "t.Wild.path = '\u2028\x0c\x85'\n"),
    stored({"path": "\nfrom here\nimport it\n"}, run=HEAD + 't.Wild.path = """\nfrom here\nimport it\n"""\n'),
    stored({"devices": "2", "path": "-1"}, run=HEAD + "t.Wild.devices = 2\nt.Wild.path = -1\n"),
    stored({"names": ("1", "a"), "starts": {"3": "4"}}, run=HEAD + "t.Wild.names = [1, 'a']\nt.Wild.starts = {3: 4}\n"),
    stored({"either": 2}, run=HEAD + "t.Wild.either = 2\n"),
    stored("run.gin:2: .*path = 1.5, but it must be str", run=HEAD + "t.Wild.path = 1.5\n"),
    stored("run.gin:2: .*path = None, but it must be str", run=HEAD + "t.Wild.path = None\n"),
    stored("run.gin:2: .*listed = 'abc', but it must be .*Sequence", run=HEAD + "t.Wild.listed = 'abc'\n"),
    stored("run.gin:2: data is not a value; a string needs quotes", run=HEAD + "t.Wild.path = data/a.json\n"),
    stored("run.gin: unhashable", run=HEAD + "t.Wild.starts = {[1]: 2}\n"),
    stored("run.gin:2: .*null byte", run=HEAD + "t.Wild.path = 'a\0b'\n"),
    stored("run.gin is not UTF-8 text", run=(HEAD + "t.Wild.count = 1\n").encode("utf-16")),
    stored("run.gin is not UTF-8 text", run=(HEAD + "t.Wild.path = 'é'\n").encode("latin-1")),
    stored({}, run=""),
    stored({"count": 2}, run=HEAD + "t.Wild.count = 1\nt.Wild.count = 2\n"),
    stored("run.gin:1: run.gin includes itself", run="include 'run.gin'\n"),
    stored("b.gin:1: run.gin includes itself, by way of b.gin", run="include 'b.gin'\n", b="include 'run.gin'\n"),
    stored({"count": 2}, run=f"{HEAD}include 'b.gin'\ninclude 'b.gin'\n", b="t.Wild.count = 2\n"),
    stored(
        {"count": 2, "path": "b"}, "run", "b", run=HEAD + "t.Wild.count = 1\nt.Wild.path = 'b'\n", b="t.Wild.count=2"
    ),
    stored({"count": 1}, "b", "run", run=HEAD + "t.Wild.count = 1\n", b=HEAD + "t.Wild.count = 2\n"),
    stored({"count": 2}, run=HEAD + "include 'b.gin'\n", b="t.Wild.count = 2\n"),
    stored({"count": 2}, run="include 'b.gin'\nt.Wild.count = 2\n", b=HEAD),
    stored({}, "run", "b", run=HEAD, b=HEAD),
    stored(
        "b.gin:1: t is models.axes here, but test_settings_wild at run.gin:1; .* as another name",
        *("run", "b"),
        run=HEAD,
        b="from models import axes as t\n",
    ),
    stored("run.gin:2: t is models.axes here, but .* at run.gin:1", run=HEAD + "from models import axes as t\n"),
    stored("b.gin:1: t is models.axes here", run=HEAD + "include 'b.gin'", b="import models.axes as t"),
    stored({"path": "2"}, "run", "b", run=HEAD + "t.Wild.path = %D\n", b="D = 2\n"),
]


def argv(case: Case) -> list[str]:
    bare = (f"t.Wild.{setting}" if setting[:1] != "@" else setting[1:] for setting in case.typed)
    return [*(f"--gin_file={name}" for name in case.named), *(f"--gin.{setting}" for setting in bare)]


def load(arguments: Sequence[str]) -> Wild:
    parsed = command.parse_arguments(arguments, command.new_parser("train", ""), needs_workdir=False)
    return config.load(parsed.gin_files, parsed.bindings, sys.modules[__name__].Wild)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: writes a case's files where commands are typed."""
    monkeypatch.chdir(tmp_path)

    def write(case: Case) -> None:
        for name, content in case.files.items():
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


@pytest.mark.parametrize("case", TYPED + STORED, ids=lambda case: repr((*case.typed, *case.files.values()))[:60])
def test_a_setting_is_what_was_typed_or_refused(case: Case, files: Any) -> None:
    files(case)
    if isinstance(case.right, str):
        with pytest.raises(ConfigError, match=case.right):
            load(argv(case))
    else:
        assert load(argv(case)) == dataclasses.replace(Wild(), **case.right)


@pytest.mark.parametrize("case", [c for c in TYPED if not isinstance(c.right, str)], ids=lambda c: repr(c.typed)[:60])
def test_what_was_asked_for_and_what_it_became_are_gin_files_of_the_same_run(case: Case, files: Any) -> None:
    files(case)
    parsed = command.parse_arguments(argv(case), command.new_parser("train", ""), needs_workdir=False)
    got = load(argv(case))
    Path("asked.gin").write_text(config.asked(parsed.gin_files, parsed.bindings), encoding="utf-8")
    Path("operative.gin").write_text(config.operative(got), encoding="utf-8")
    assert load(["--gin_file=asked.gin"]) == load(["--gin_file=operative.gin"]) == got


def test_a_gin_file_that_is_a_directory_or_cannot_be_read_is_refused(files: Any, monkeypatch: Any) -> None:
    Path("dir.gin").mkdir()
    with pytest.raises(ConfigError, match=r"^dir.gin cannot be read: Is a directory"):
        load(["--gin_file=dir.gin"])
    Path("run.gin").write_text("include 'dir.gin'\n")
    with pytest.raises(ConfigError, match=r"^run.gin:1: dir.gin cannot be read: Is a directory"):
        load(["--gin_file=run.gin"])

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"^run.gin cannot be read: Permission denied"):
        load(["--gin_file=run.gin"])


def test_an_include_is_looked_for_beside_its_file_then_where_the_command_runs(files: Any) -> None:
    Path("configs").mkdir()
    Path("configs/run.gin").write_text(HEAD + "include 'b.gin'\ninclude 'c.gin'\n")
    Path("configs/b.gin").write_text("t.Wild.path = 'beside'\n")
    for name in ("b.gin", "c.gin"):
        Path(name).write_text("t.Wild.path = 'here'\nt.Wild.count = 1\n")
    assert load(["--gin_file=configs/run.gin"]) == Wild(path="here", count=1)
    Path("c.gin").write_text("t.Wild.count = 1\n")
    assert load(["--gin_file=configs/run.gin"]) == Wild(path="beside", count=1)


def test_a_setting_with_a_space_in_place_of_the_sign_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(["--gin_file=run.gin", "--gin.t.Wild.count", "3"])
    assert ended.value.code == 2 and "write --gin.t.Wild.count=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_records_are_utf8_and_printing_ends_no_run_whatever_the_locale(locale: str, tmp_path: Path) -> None:
    code = r"""
import pathlib, sys
from hetjax.run import command, record
command.new_parser("train", "")
print("2 \xd7 3 \u65e5\u672c")
record.write(pathlib.Path(sys.argv[1]), {"config.gin": "# \xe9 \u65e5\u672c"}, None)
record.write(pathlib.Path(sys.argv[1]), {"config.gin": "# \xe9"}, 3)
"""
    changes = dict(
        LC_ALL=locale, PYTHONIOENCODING="ascii", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(ROOT)
    )
    line = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(line, env=os.environ | changes, capture_output=True, text=True)
    assert ran.returncode == 0 and re.match(r"2 \\xd7 3 \\u65e5", ran.stdout), ran.stderr
    kept = {path.name: path.read_bytes().decode() for path in tmp_path.iterdir()}
    assert kept == {"config.gin": "# é", "config_until_step_3.gin": "# é 日本"}


def test_lines_of_answers_are_json_whatever_the_terminal_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in {"ascii": r'"\u00e9"', "utf-8": '"é"'}.items():
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert shown in answers._line(generate.ask("é"), generate.Answer("é", [3], True, 1))
