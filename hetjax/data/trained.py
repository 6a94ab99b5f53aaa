"""What an entry asks of its training that a run does not do: then it is a bad sample, and never trained on otherwise.

Every answer of a sample is trained on, with the same weight, and nothing is trained against.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hetjax.data.naming import NOTHING
from hetjax.data.problems import SampleError, shown

# keys of an answer -> what it holds where the answer is trained on as any other; True is 1, and False is 0
OF_ANSWERS: Mapping[str, Any] = {
    "weight": 1,
    "loss": 1,
    "loss_scale": 1,
    "train": 1,
    "training": 1,
    "mask": 0,
    "train_detail": None,
    "training_detail": None,
}
UNUSED = re.compile("instruction|(chosen|rejected)(_(response|message|conversation|answer|image)s?)?")  # beside turns


def check(entry: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """Raises SampleError if an answer or the entry shall have no weight or one of its own, if it is an example of what
    is wrong, or says more than its turns."""
    for answer in answers:
        for key, usual in OF_ANSWERS.items():
            if answer.get(key) not in (None, usual):
                why = "every answer is trained on alike; take the sample out"
                raise SampleError("", f"an answer has {key}={shown(answer[key])}, but {why}")
    if entry.get("weight") not in (None, 1) or entry.get("label") is False:
        key = "label" if entry.get("label") is False else "weight"
        raise SampleError("", f"it has {key}={shown(entry[key])}, but every sample is trained on alike; take it out")
    for key, value in entry.items():
        if value not in NOTHING and UNUSED.fullmatch(key):
            raise SampleError("", f"it has {key} beside its turns, which nothing reads; write it as a turn, or cut it")
