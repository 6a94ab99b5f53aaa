"""What is wrong with one sample, in one short line that any terminal can print."""

import reprlib
from typing import Any, NamedTuple

SHORT = reprlib.Repr()  # of a few levels: `repr` fails for what is nested deeply
SHORT.maxstring = SHORT.maxother = 60
LONGEST_NAME, LONGEST_PATH, LONGEST_REASON = 60, 100, 130  # characters


class Problem(NamedTuple):
    """A sample that is left out. `path` is the picture or clip at fault, else the file that holds the sample.

    `sample` is a name as `name_of` makes them."""

    sample: str
    path: str
    reason: str

    def __str__(self) -> str:
        path = one_line(self.path, LONGEST_PATH, keep_end=True)
        return f"sample '{self.sample}' ({path}): {one_line(self.reason, LONGEST_REASON)}"


def name_of(value: Any, ordinal: int) -> str:
    """What an entry of a data set is called: its id, in a form that prints, else its place."""
    found = value.get("id") if isinstance(value, dict) else None
    plain = found if isinstance(found, (str, int, float)) else ordinal if found is None else shown(found)
    return one_line(str(plain), LONGEST_NAME)


class SampleError(Exception):
    """Why one sample cannot be used; `path` as in `Problem`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


def one_line(text: str, longest: int, *, keep_end: bool = False) -> str:
    """`text` without line ends, half characters and whatever else does not print, cut to `longest` characters.

    `keep_end`: cut in front, as of a path, whose end says more."""
    text = text[-longest - 1 :] if keep_end else text[: longest + 1]  # before it is escaped: it may be a whole picture
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(shown) <= longest:
        return shown
    return "..." + shown[3 - longest :] if keep_end else shown[: longest - 3] + "..."


def shown(value: Any) -> str:
    """A value of JSON, as short as a message can hold it."""
    return one_line(SHORT.repr(value), 60)
