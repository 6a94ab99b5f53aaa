"""Writes a converted checkpoint: the parameters of a source with all that its export will need."""

import shutil
from pathlib import Path

import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from hetjax import config
from hetjax.hf.errors import ConvertError
from hetjax.hf.folder import Folder, open_file
from hetjax.hf.output import written
from hetjax.hf.stored import FILES, MODEL, PARAMS, UNUSED, nested

WHOLE = slice(None)


def store(folder: Folder, out: str | Path) -> None:
    """Writes the folder as a checkpoint at `out`, in the precision that it has. Raises ConvertError."""
    arrays = {
        name: array[(WHOLE,) * len(folder.arrays[name].shape)]
        for name, array in folder.fetch(list(folder.arrays)).items()
    }
    extras = next(iter(folder.extras.values()))  # one folder: the same for all
    with written(out) as new:
        (new / FILES).mkdir(parents=True)
        with ocp.StandardCheckpointer() as writer:
            writer.save(new / PARAMS, {"params": nested(arrays)})
        (new / MODEL).write_text(config.operative(folder.parts))
        for name, path in {"config.json": folder.path / "config.json", **extras.files}.items():
            shutil.copyfile(path, new / FILES / name)
        unused = {key: open_file(path).get_tensor(extras.spelled[key]) for key, path in extras.idle.items()}
        if unused:
            save_file(unused, new / UNUSED, {"format": "pt"})


def check_folder(source: object) -> Folder:
    """`source`, if it is a Hugging Face folder. Raises ConvertError."""
    if not isinstance(source, Folder):
        raise ConvertError(f"{getattr(source, 'path', source)} is no Hugging Face folder: it has no config.json")
    return source
