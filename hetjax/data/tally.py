"""What of a data set is not trained on as it stands: counted, and named once, however many epochs meet it."""

import logging
import threading

from hetjax.data.conversations import Sample
from hetjax.data.problems import Problem, one_line
from hetjax.data.settings import DataConfig, DataError

LONGEST = 200  # characters of what is said of a sample that is cut
LOG = logging.getLogger(__name__)


class Tally:
    """Samples by what became of them; but for `bad`, by their ordinals.

    bad: malformed ones and those with a missing or broken file, each once.
    masked: bad ones that keep their place, without weight, as a file of theirs could not be decoded.
    truncated, cut_items: those whose text, or whose pictures or clips, were cut.
    too_long: those skipped for their length."""

    def __init__(self, config: DataConfig, num_samples: int) -> None:
        self.bad: list[Problem] = []
        self.masked: set[int] = set()
        self.truncated: set[int] = set()
        self.cut_items: set[int] = set()
        self.too_long: set[int] = set()
        self._config, self._num_samples = config, num_samples
        self._named: set[int] = set()  # ordinals in `bad`
        self._naming = threading.Lock()  # a pass for evaluation may run beside the thread that works ahead

    def reject(self, ordinal: int, problem: Problem, *, masked: bool = False) -> None:
        """Notes a bad sample. Raises DataError if the run stops for one, or if no good one can be left."""
        if self._config.on_bad_item == "stop":
            raise DataError(f"{problem}; repair it, or set DataConfig.on_bad_item='skip' to go on without it")
        with self._naming:
            new = ordinal not in self._named
            if new:
                self._named.add(ordinal)
                self.bad.append(problem)
                self.masked |= {ordinal} if masked else set()
        if new:
            LOG.warning("%s %s", "masked" if masked else "skipped", problem)
        self._check_any_left()

    def cut(self, sample: Sample, seen: set[int], what: str) -> None:
        """Notes a sample that is cut or too long, in `seen`, which is one of the sets. Raises DataError as `reject`."""
        if not seen:
            LOG.warning("sample '%s': %s; further ones are only counted", sample.id, one_line(what, LONGEST))
        seen.add(sample.ordinal)
        self._check_any_left()

    def report(self) -> str:
        """The counts, in a line."""
        masked = f" ({len(self.masked)} of them masked where they stand)" if self.masked else ""
        counts = {"cut": self.truncated, "with a cut picture or clip": self.cut_items, "too long": self.too_long}
        return "; ".join([f"bad samples: {len(self.bad)}{masked}", *(f"{k}: {len(v)}" for k, v in counts.items())])

    def _check_any_left(self) -> None:
        if len(self._named) + len(self.too_long) < self._num_samples:
            return
        reasons = "; ".join(str(p) for p in self.bad[:3])
        raise DataError(
            f"{self._config.path}: every one of its {self._num_samples} samples is left out, {len(self.bad)} as bad "
            f"and {len(self.too_long)} as longer than seq_len={self._config.seq_len}. {reasons or 'Raise seq_len'}"
        )
