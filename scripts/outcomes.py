"""How trials of faults ended: a line each in a file, so that an interrupted script goes on, and a table of them."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import lines

HEAD = "| fault |"  # what the table begins with


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One trial of a fault in a run of so many processes."""

    fault: str
    processes: int
    number: int
    seed: int = 0
    seconds: float = 0.0  # from the fault to the run's end
    codes: tuple[int, ...] = ()  # exit statuses
    minutes: float = 0.0  # of the whole trial
    wrong: str = ""  # what was not as it should be

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Which trial it is."""
        return self.fault, self.processes, self.number, self.seed


def read(path: Path) -> list[Outcome]:
    """Of each trial in the file the newest outcome."""
    found = [Outcome(**values | {"codes": tuple(values["codes"])}) for values in lines.read(path)]
    return list({one.key: one for one in found}.values())


def add(path: Path, outcome: Outcome) -> None:
    """Puts it into the file."""
    lines.add(path, dataclasses.asdict(outcome))


def table(outcomes: Iterable[Outcome], faults: Sequence[str]) -> str:
    """Of each fault the trials that were as they should be, of all, by processes; the slowest end and the statuses."""
    known = [outcome for outcome in outcomes if outcome.fault in faults]
    counts = sorted({outcome.processes for outcome in known})
    columns = [*(f"{count} processes" for count in counts), "slowest end", "exit status"]
    rows = [f"{HEAD} {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
    for fault in faults:
        of_fault = [outcome for outcome in known if outcome.fault == fault]
        if not of_fault:
            continue
        by_count = [[o for o in of_fault if o.processes == count] for count in counts]
        shares = [f"{sum(not o.wrong for o in tried)} of {len(tried)}" if tried else "" for tried in by_count]
        good = [o for o in of_fault if not o.wrong]
        slowest = f"{max(o.seconds for o in good):.0f} s" if good else ""
        codes = ", ".join(map(str, sorted({code for o in good for code in o.codes})))
        rows.append(f"| {fault} | {' | '.join(shares)} | {slowest} | {codes} |")
    return "\n".join(rows)


def put_in(page: Path, found: str) -> None:
    """The table in place of the page's. Raises ValueError where the page has none."""
    before, head, rest = page.read_text().partition(f"\n{HEAD}")
    if not head:
        raise ValueError(f"{page} has no table that begins with {HEAD}")
    page.write_text(f"{before}\n{found}\n\n{rest.partition(chr(10) * 2)[2]}")
