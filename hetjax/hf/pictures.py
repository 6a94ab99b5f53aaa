"""Between preprocessor_config.json and how a run reads pictures. What our reader cannot do is refused by field.

Fields that are absent have the defaults of transformers' processor classes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetjax.data import Pictures
from hetjax.hf.errors import ConvertError
from hetjax.hf.fields import present, refused
from hetjax.hf.source import read_json

FILE, NESTED = "preprocessor_config.json", "processor_config.json"  # transformers 5 nests the one in the other
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers
CLIP, SIGLIP, LLAVA = "CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"
ALL = dict(do_resize=True, resample=RESAMPLE["bicubic"], do_rescale=True, rescale_factor=1 / 255, do_normalize=True)
DEFAULTS: dict[str, dict[str, Any]] = {
    CLIP: ALL
    | dict(
        size={"shortest_edge": 224},
        do_center_crop=True,
        crop_size={"height": 224, "width": 224},
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    ),
    SIGLIP: ALL
    | dict(
        size={"height": 224, "width": 224},
        do_center_crop=False,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
}
DEFAULTS[LLAVA] = DEFAULTS[CLIP]
OF_MODEL = {"clip": CLIP, "siglip": SIGLIP, "llava": LLAVA}  # model_type beside a file that names no class
NAFLEX = (
    "SigLIP 2 with pictures of any shape (NaFlex) is not supported; take one of fixed size, such as "
    "google/siglip2-base-patch16-256, whose model_type is siglip"
)
SETTINGS = {field.name: field.name for field in dataclasses.fields(Pictures)} | dict.fromkeys(
    ("height", "width"), "image_size"
)
ONLY = dict(do_resize=True, do_rescale=True, rescale_factor=1 / 255, use_square_size=False)


def read(files: Mapping[str, Path]) -> Pictures | None:
    """The reader that a folder's processor files describe, None where they tell of no pictures. Raises ConvertError."""
    where, config = _find(files)
    if config is None:
        return None
    config = present(config)
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or _kind_beside(Path(where))
    name = plain_name(kind).replace("FeatureExtractor", "ImageProcessor")
    if name == "Siglip2ImageProcessor":
        raise refused(where, "image_processor_type", kind, NAFLEX)
    if name not in DEFAULTS:
        why = f"pictures are read as {', '.join(DEFAULTS)} do; name the one that is meant"
        raise _refused(where, "image_processor_type", kind, why)
    c = DEFAULTS[name] | config
    for field, value in ONLY.items():
        if c.get(field, value) != value:
            raise _refused(where, field, c[field], f"pictures are read with {value!r}")
    methods = {number: name for name, number in RESAMPLE.items()}
    if c["resample"] not in methods:
        told = ", ".join(f"{number} ({name})" for number, name in methods.items())
        raise _refused(where, "resample", c["resample"], f"pictures are resized with one of {told}")
    pads = c.get("do_pad", False)
    if pads and (name != LLAVA or not c["do_normalize"]):
        why = f"pictures are padded as {LLAVA} does before it normalises"
        raise _refused(where, "do_pad", pads, f"{why}, which this file does not ask for")
    normal = (c["image_mean"], c["image_std"]) if c["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
    mean, std = (tuple(v) if isinstance(v, list | tuple) else (v,) * 3 for v in normal)
    size = _size(c, "size", where, square=c.get("default_to_square", False))
    edge = size.get("shortest_edge")
    more: dict[str, Any] = dict(pad_to_square=pads, resampling=methods[c["resample"]])
    if not c["do_center_crop"]:
        if pads and edge is not None:  # of a square
            return Pictures(edge, edge, mean, std, **more)
        if edge is not None:
            why = f"without a crop pictures must have one height and width, as in {dict(height=edge, width=edge)}"
            raise _refused(where, "size", c["size"], why)
        return Pictures(size["height"], size["width"], mean, std, **more)
    crop = _size(c, "crop_size", where, square=True)
    if edge is None and size != crop:
        raise _refused(where, "size", c["size"], f"crop_size={crop} cuts something else than the middle of a picture")
    return Pictures(crop["height"], crop["width"], mean, std, edge, **more)


def _size(c: Mapping[str, Any], field: str, where: str, *, square: bool) -> dict[str, int]:
    """The field as a height and width, or as a shortest edge, which one number is unless it means a `square`."""
    told = c[field]
    if isinstance(told, list) and len(told) == 2:
        told = dict(zip(("height", "width"), told, strict=True))
    elif not isinstance(told, Mapping):
        told = dict.fromkeys(("height", "width") if square else ("shortest_edge",), told)
    found = present(told)
    if found.keys() not in ({"height", "width"}, {"shortest_edge"} if field == "size" else None):
        raise _refused(where, field, c[field], "pictures have one height and width, or one shortest edge before a crop")
    return found


def _kind_beside(path: Path) -> str:
    """The class of a processor whose file, at `path`, names none: transformers tells it from config.json."""
    model = path.parent / "config.json"
    return OF_MODEL.get(str(read_json(model).get("model_type")), "") if model.is_file() else ""


def plain_name(kind: str) -> str:
    """The class of a processor without what tells how it is implemented, which every version of transformers has."""
    return kind.removesuffix("Fast").removesuffix("Pil")


def _find(files: Mapping[str, Path]) -> tuple[str, Mapping[str, Any] | None]:
    if FILE in files:
        return str(files[FILE]), read_json(files[FILE])
    nested = read_json(files[NESTED]).get("image_processor") if NESTED in files else None
    return str(files.get(NESTED)), nested


def _refused(where: str, field: str, value: object, why: str) -> ConvertError:
    return refused(where, field, value, f"{why}, or remove the file to train with the run's own settings")


def check(encoder: str, ours: Pictures, files: Mapping[str, Path], *, resized: bool = False) -> None:
    """Raises ConvertError, with what to set, unless `encoder` sees pictures as the model did that came with `files`.

    `resized`: in its own size, of which the middle that is cut out, if one is, has the same part. To pad pictures is
    free: LLaVA-1.5 did so before a CLIP that knew none of them."""
    theirs = read(files)
    if theirs is None:
        return
    theirs = _in_size_of(ours, theirs) if resized else theirs
    theirs = dataclasses.replace(theirs, pad_to_square=theirs.pad_to_square or ours.pad_to_square)
    if theirs == ours:
        return
    differing = [f for f in SETTINGS if getattr(ours, f) != getattr(theirs, f)]
    told = ", ".join(f"{SETTINGS[f]}={getattr(theirs, f)!r} (the run has {getattr(ours, f)!r})" for f in differing)
    where = f"{_find(files)[0]}, which came with the parameters in Experiment.init_from,"
    says = f"read for pictures of {ours.height} x {ours.width} says" if resized else "says"
    raise ConvertError(
        f"{encoder}: {where} {says} {told}; set the encoder to that, or remove the file to show the model other "
        "pictures than it knows"
    )


def _in_size_of(ours: Pictures, theirs: Pictures) -> Pictures:
    edge = theirs.shortest_edge
    edge = None if edge is None else round(edge * ours.height / theirs.height)
    return dataclasses.replace(theirs, height=ours.height, width=ours.width, shortest_edge=edge)


def write(reader: Pictures) -> dict[str, Any]:
    """preprocessor_config.json for `reader`."""
    square = {"height": reader.height, "width": reader.width}
    crop = {"size": {"shortest_edge": reader.shortest_edge}, "do_center_crop": True, "crop_size": square}
    whole = {"size": square} | ({"do_center_crop": False} if reader.pad_to_square else {})
    kind = LLAVA if reader.pad_to_square else SIGLIP if reader.shortest_edge is None else CLIP
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        **({"do_pad": True} if reader.pad_to_square else {}),
        "do_resize": True,
        **(whole if reader.shortest_edge is None else crop),
        "resample": RESAMPLE[reader.resampling],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(reader.mean),
        "image_std": list(reader.std),
        "processor_class": "LlavaProcessor",
    }


def rewritten(files: Mapping[str, Path], reader: Pictures) -> dict[str, dict[str, Any]]:
    """What takes the place of a tower's processor file if that tells of other pictures than `reader` makes."""
    if read(files) in (None, reader):
        return {}
    return {FILE: {name: value for name, value in write(reader).items() if name != "processor_class"}}
