"""What a soak makes of the memory that it saw."""

import pytest
import runs


def test_a_process_that_grows_is_told_from_one_that_finds_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(runs.ROOT / "scripts"))
    from soak import is_flat, longest, quarters

    grows, settles = (lambda step: 600 + 0.03 * step), (lambda step: 600 + 60 * (1 - 0.5 ** (step / 250)))
    samples = [(0, step, [grows(step), settles(step)]) for step in range(1, 2001)]
    earlier = [(1, step, [999.0, 999.0]) for step in range(1, 100)]  # of a call that made fewer steps
    kept = longest([*earlier, *samples])
    assert kept[0] == (1, [grows(1), settles(1)]) and len(kept) == 2000
    found = quarters(kept)
    assert [len(memory) for memory in found] == [4, 4] and found[0] == sorted(found[0])
    assert [is_flat(memory) for memory in found] == [False, True]
