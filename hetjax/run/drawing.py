"""Boxes and words on a white page, as SVG for a browser and as PNG."""

import html
import io
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

FONT = 12  # pixels
DENSITY = 2  # dots of a PNG for each pixel


class Box(NamedTuple):
    """A rectangle, in pixels. `label`: written in it where it has room; `told`: what a browser says of it."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    label: str = ""
    told: str = ""

    @property
    def written(self) -> str:
        """The label, if there is room."""
        return self.label if self.width > 8 * len(self.label) else ""


class Words(NamedTuple):
    """A line that begins at x, with its foot at y."""

    x: float
    y: float
    text: str


class Drawing(NamedTuple):
    """A page of this size and what is on it."""

    width: int
    height: int
    boxes: list[Box]
    words: list[Words]

    def svg(self) -> str:
        """For a browser, which says what a box is when pointed at."""
        style = f"text {{ font: {FONT}px sans-serif }} .box text {{ fill: white; text-anchor: middle }}"
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}">',
            f"<style>{style}</style>",
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>',
        ]
        for x, y, text in self.words:
            lines.append(f'<text x="{x:g}" y="{y:g}">{html.escape(text)}</text>')
        for box in self.boxes:
            x, y = box.x + box.width / 2, box.y + box.height / 2 + 5
            label = f'<text x="{x:.1f}" y="{y:.1f}">{html.escape(box.written)}</text>' if box.written else ""
            shape = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
            lines.append(
                f'<g class="box"><title>{html.escape(box.told)}</title>'
                f'<rect {shape} fill="{box.colour}" stroke="white"/>{label}</g>'
            )
        return "\n".join([*lines, "</svg>", ""])

    def png(self) -> bytes:
        """The same page as a picture."""
        image = Image.new("RGB", (self.width * DENSITY, self.height * DENSITY), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT * DENSITY)
        for x, y, text in self.words:
            draw.text((x * DENSITY, y * DENSITY), text, "black", font, anchor="ls")
        for box in self.boxes:
            left, top, right, bottom = (n * DENSITY for n in (box.x, box.y, box.x + box.width, box.y + box.height))
            draw.rectangle((left, top, max(right - 1, left), bottom), box.colour, "white" if right - left > 4 else None)
            draw.text(((left + right) / 2, (top + bottom) / 2), box.written, "white", font, anchor="mm")
        file = io.BytesIO()
        image.save(file, "png", optimize=True)
        return file.getvalue()
