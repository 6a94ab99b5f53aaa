"""Viewers that a run writes to beside its own files, by setting; each is an extra."""

import importlib.util
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetjax.run import cluster, record
from hetjax.run.samples import Sample

Values = Mapping[str, Any]
NOT_IN_NAMES = "/\\#?%:"  # of wandb's projects
WANDB = "wandb.json"  # in the workdir: which run of which project it is


def check(*, tensorboard: bool, wandb: str) -> None:
    """Raises ValueError for a viewer whose package this process, if it is to write there, has not got."""
    if not cluster.is_primary():
        return
    asked = {"tensorboardX": ("tensorboard", tensorboard, False), "wandb": ("wandb", wandb, "")}
    for package, (setting, value, without) in asked.items():
        if value and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{setting}={value!r} needs the package {package}, which is not installed; "
                f"run `pip install 'hetjax[{setting}]'` or set {setting}={without!r}"
            )
    if found := sorted(set(wandb) & set(NOT_IN_NAMES)):
        raise ValueError(f"wandb={wandb!r} has {' '.join(found)}, which no project's name may; give it another name")


class TensorBoard:
    """Event files in DIR/tensorboard; viewers hide what an interrupted run wrote for steps after `resumed_step`."""

    def __init__(self, directory: Path, resumed_step: int | None) -> None:
        from tensorboardX import SummaryWriter  # an extra, and slow to import

        purge_step = 0 if resumed_step is None else resumed_step + 1
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            lines = (sample.question, f"**answer** {sample.answer}", f"**expected** {sample.expected}")
            self.writer.add_text(f"sample/{number}", "\n\n".join(lines), step)
            for place, picture in enumerate(sample.pictures):
                self.writer.add_image(f"sample/{number}/{place}", picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of wandb, in DIR/wandb until it is sent. A run that goes on is the same one there, by the id in
    DIR/wandb.json; what it writes a second time has the same steps. WANDB_MODE=offline sends nothing."""

    def __init__(self, directory: Path, project: str, *, resumed: bool) -> None:
        import wandb  # an extra, and slow to import

        self.wandb, path = wandb, directory / WANDB
        directory.mkdir(parents=True, exist_ok=True)
        told = json.loads(path.read_text(encoding="utf-8")) if resumed and path.is_file() else {}
        name = told["id"] if told.get("project") == project else secrets.token_hex(4)
        how = dict(resume="allow", settings=wandb.Settings(console="off", quiet=True))
        try:
            self.run = wandb.init(
                project=project, id=name, name=directory.name, dir=directory, config=record.settings(directory), **how
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb={project!r}: {error}; log in by `wandb login`, or set WANDB_MODE=offline in the environment"
            ) from error
        path.write_text(json.dumps({"project": project, "id": name}), encoding="utf-8")
        self.run.define_metric("*", step_metric="step")  # wandb's own step cannot go back to that of a checkpoint

    def write(self, step: int, values: Values) -> None:
        self.run.log({"step": step, **values})

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [[sample.id, sample.question, sample.answer, sample.expected] for sample in samples]
        table = self.wandb.Table(["id", "question", "answer", "expected"], rows)
        pictures = {
            f"sample/{s.id}": [self.wandb.Image(picture) for picture in s.pictures] for s in samples if s.pictures
        }
        self.run.log({"step": step, "samples": table, **pictures})

    def close(self) -> None:
        self.run.finish()
