"""Sample answers: each row's tokens go behind its own, whichever row ends first."""

from typing import Any

import numpy as np

from hetjax.run import samples

END, SEQ_LEN = 9, 8


class Counts:
    """Says 1 more than the token it stands at: after 8 the end."""

    def evaluate(self, state: None, arrays: Any) -> tuple[float, np.ndarray]:
        return 0.0, arrays["tokens"] + 1


def test_rows_that_ended_or_are_full_let_the_others_go_on() -> None:
    rows = {0: (6, 1), 1: (1, 7), 2: (0, 2), 3: (7, 3)}  # row -> place and token at the question's end
    owner = np.full((4, SEQ_LEN), -1, np.int32)
    arrays = {name: np.zeros((4, SEQ_LEN), np.int32) for name in ("tokens", "positions", "segment_ids")}
    for row, (place, token) in rows.items():
        owner[row, place], arrays["tokens"][row, place] = row, token
    trainer: Any = Counts()
    said = samples.decode(trainer, None, arrays, owner, END, 20)  # type: ignore[arg-type]
    assert list(said) == [[2, 3], [8], [3, 4, 5, 6, 7, 8], [4]]
    assert not arrays["segment_ids"].any()
    assert list(samples.decode(trainer, None, arrays, owner, END, 2)) == [[2, 3], [8], [3, 4], [4]]  # type: ignore[arg-type]
