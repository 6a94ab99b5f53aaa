"""Several processes plan all microbatches alike, and each reads its own files: here threads stand for processes."""

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus import BOTH, VISION, Spec
from test_masked import HALVED, SHAPES, SPECS, halve

from hetjax.data import DataConfig, DataError, Loader
from hetjax.data.together import ALONE, Here

Found = tuple[Loader, list[dict[str, np.ndarray]], list[str]]


class Talk:
    """What threads tell each other."""

    def __init__(self, count: int) -> None:
        self._barrier, self._said = threading.Barrier(count, timeout=20), [""] * count

    def of(self, number: int) -> Callable[[str], Sequence[str]]:
        def tell(said: str) -> Sequence[str]:
            self._said[number] = said
            self._barrier.wait()
            heard = list(self._said)
            self._barrier.wait()
            return heard

        return tell


def cut(count: int, number: int) -> dict[str, set[int]]:
    """The slots of one of so many processes; the last one has none."""
    whole = {item.name: 2 * item.slots_per_group for item in BOTH}
    return {
        name: set() if number == count - 1 else set(range(number * n // (count - 1), (number + 1) * n // (count - 1)))
        for name, n in whole.items()
    }


def together(count: int, function: Callable[[Here], Any]) -> list[Any]:
    """What it gives in each of so many processes."""
    talk = Talk(count)
    with ThreadPoolExecutor(count) as pool:
        heres = [Here(cut(count, n), talk.of(n)) for n in range(count)]
        return [future.result() for future in [pool.submit(function, here) for here in heres]]


def read(path: str, here: Here, settings: dict[str, Any], *, start: str = "", steps: int = 8) -> Found:
    """The loader, the microbatches of so many steps, and the position before each."""
    prepare = lambda arrays: arrays | {"count": arrays["weights"].sum()}
    with Loader(DataConfig(path, **settings), BOTH, prepare, here) as loader:
        found, states = [], []
        if start:
            loader.restore(json.loads(start))
        loader.read_first(endless=True)
        for _ in range(steps):
            states.append(json.dumps(loader.state()))
            found += loader.next_step(2)
    return loader, found, states


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data of which some pictures can be opened but not decoded."""
    directory = tmp_path_factory.mktemp("data")
    made = corpus.write(directory, SPECS)
    for n in HALVED:
        halve(next(directory.glob(f"*-{n}-0.png")))
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_processes_make_one_microbatch_each_with_its_own_pictures(path: str, shape: dict[str, Any]) -> None:
    alone, wanted, states = read(path, ALONE, shape)
    parts = together(3, lambda here: read(path, here, shape))
    for loader, _, same in parts:
        assert same == states
        assert loader.tally.masked == alone.tally.masked != set()
        assert {p.sample for p in loader.bad} == {p.sample for p in alone.bad}
        assert loader.media_bytes == parts[0][0].media_bytes
    sizes = parts[0][0].media_bytes
    assert sizes[2] == 0 and min(sizes[:2]) > 0 and sum(sizes) == alone.media_bytes[0]
    for n, right in enumerate(wanted):
        for name, array in right.items():
            mine = [part[1][n][name] for part in parts]
            if name.endswith(".pixels"):
                for number, pixels in enumerate(mine):
                    held = sorted(cut(3, number)[name.removesuffix(".pixels")])
                    np.testing.assert_array_equal(pixels[held], array[held])
                    assert not np.delete(pixels, held, 0).any(), "it read a picture of another's"
            else:
                assert all(np.array_equal(one, array) for one in mine), name


def test_a_position_goes_on_under_another_number_of_processes(path: str) -> None:
    _, wanted, states = read(path, ALONE, SHAPES[0])
    _, _, same = together(2, lambda here: read(path, here, SHAPES[0]))[1]
    for _, found, _ in together(4, lambda here: read(path, here, SHAPES[0], start=same[3], steps=5)):
        for right, batch in zip(wanted[6:], found, strict=True):
            assert all(np.array_equal(batch[k], right[k]) for k in right if not k.endswith(".pixels"))
    assert same == states


def test_every_process_names_the_picture_that_one_of_them_cannot_read(tmp_path: Path) -> None:
    path = corpus.write(tmp_path, [Spec({"vision": (1,)})] * 4)
    halve(tmp_path / "vision-2-0.png")
    settings: dict[str, Any] = dict(seq_len=12, samples_per_group=2, groups=2, on_bad_item="stop")

    def run(here: Here) -> str:
        with Loader(DataConfig(path, **settings), [VISION], here=here) as loader, pytest.raises(DataError) as error:
            loader.next_step(4)
        return str(error.value)

    said = together(3, run)
    assert len(set(said)) == 1 and "sample 'id-2'" in said[0] and "vision-2-0.png" in said[0]


def test_a_pass_and_questions_are_masked_by_all(tmp_path: Path) -> None:
    path = corpus.write(tmp_path, [Spec({"vision": (1,)})] * 5)
    halve(tmp_path / "vision-1-0.png")

    def run(here: Here) -> list[set[int]]:
        with Loader(DataConfig(path, seq_len=12, samples_per_group=2, groups=2), [VISION], here=here) as loader:
            passes = list(loader.one_pass()), list(loader.questions(5))
        return [{int(n) for _, owner in found for n in owner.ravel()} for found in passes]

    assert together(3, run) == [[{-1, 0, 2, 3, 4}] * 2] * 3


def test_processes_that_see_other_files_or_fail_end_all(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    path = corpus.write(tmp_path / "one", [Spec({"vision": (1,)})] * 4)
    shutil.copytree(tmp_path / "one", tmp_path / "two", dirs_exist_ok=True)
    (tmp_path / "two" / "vision-0-0.png").unlink()
    roots = iter(["one", "two"])

    def run(here: Here) -> str:
        shape: dict[str, Any] = dict(seq_len=12, samples_per_group=2, groups=2, shuffle=False)
        root = str(tmp_path / next(roots))
        with (
            Loader(DataConfig(path, media_root=root, **shape), [VISION], here=here) as loader,
            pytest.raises(DataError) as error,
        ):
            loader.next_step(1)
        return str(error.value)

    for said in together(2, run):
        assert "process 1 has planned another microbatch" in said and "vision-0-0.png" in said

    def fail(here: Here) -> BaseException:
        prepare: Any = dict if here.slots and here.slots["vision"] else lambda arrays: arrays[0]
        with Loader(DataConfig(path, 12, 2, 2), [VISION], prepare, here) as loader, pytest.raises(Exception) as error:
            loader.next_step(1)
        return error.value

    told, own = together(2, fail)
    assert isinstance(own, KeyError)
    assert isinstance(told, DataError) and str(told) == "process 1: KeyError(0)"
