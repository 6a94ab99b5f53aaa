"""The models that a Hugging Face folder holds."""

import dataclasses

from models.decoder import Decoder
from models.vit import ViT
from models.whisper import Whisper

Model = Decoder | ViT | Whisper
PART_OF: dict[type, str] = {Decoder: "llm", ViT: "vision", Whisper: "audio"}

# Settings that an encoder alone leaves open, and of an audio encoder also how its rows are made and how long clips are.
OF_PROJECTOR = (
    *("output_width", "projector_width", "projector_bias", "feature_layer", "select", "projector", "variant"),
    "deepstack",
)
OF_DATA = ("max_frames",)  # settings that change no parameter


@dataclasses.dataclass(frozen=True)
class Parts:
    """The models that a folder holds, by module name: a language model with an encoder, or either alone.

    An encoder alone has no projector: that of `vision` or `audio` is not stored."""

    llm: Decoder | None = None
    vision: ViT | None = None
    audio: Whisper | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a language model with an encoder."""
        return self.llm is not None and len(self.models) > 1

    @property
    def models(self) -> dict[str, Model]:
        """Module name -> model."""
        all_of = {"llm": self.llm, "vision": self.vision, "audio": self.audio}
        return {name: model for name, model in all_of.items() if model is not None}

    @property
    def encoder(self) -> str | None:
        """The module name of the encoder, if there is one."""
        return next((name for name in self.models if name != "llm"), None)
