"""Which pictures and clips of a run this process reads."""

from hetjax.core.trainer import Trainer
from hetjax.data.together import Here
from hetjax.run import cluster
from hetjax.run.experiment import Experiment


def here(run: Experiment, trainer: Trainer) -> Here:
    """Those that its devices want, beside what the other processes read."""
    arrays = {item.name: [f"{item.name}.{array}" for array in item.reader.arrays] for item in run.items}
    slots = {name: frozenset().union(*map(trainer.pipeline.rows_here, mine)) for name, mine in arrays.items()}
    return Here(slots, cluster.tell_all)
