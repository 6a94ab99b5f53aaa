"""Where a path leads. Settings, flags and Python calls all go through here, so ~ means the same everywhere."""

import os


def expanded(path: str | os.PathLike[str]) -> str:
    """`path` with a leading ~ or ~user as the home directory, and nothing else replaced. Raises ValueError for no user.

    A file whose own name begins with ~ is ./~name."""
    found = os.path.expanduser(path)
    if os.fspath(found).startswith("~"):
        user = os.fspath(found).partition("/")[0]
        raise ValueError(
            f"{os.fspath(path)!r}: {user} is no user's home directory; write ./{user} for a file called so"
        )
    return os.fspath(found)
