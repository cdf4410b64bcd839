"""loss.png: the chart of the losses as an image, for places where no HTML page can be shown."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sft_recipe.files import atomic_write
from sft_recipe.report.charts import HEIGHT, WIDTH, Chart, Curve

SIZE = (1200, 640)  # pixels
BOX = (92, 84, 1164, 566)  # of the plot: left, top, right, bottom
SCALE = 2  # drawn larger, then reduced: Pillow's lines have no smooth edges
COLORS = ("#14825a", "#7a4fc4", "#bd5312", "#1f6fb2", "#b0306a", "#6b6f1d", "#0b7f86", "#8a5a2b")
PAPER, INK, MUTED, GRID, WARN = "#ffffff", "#1c1f24", "#5f6670", "#e4e2db", "#b4480f"


def write_image(chart: Chart, title: str, path: Path) -> None:
    """Draw a chart with its title and keys, and write it as a PNG, atomically. Raises OSError."""
    drawing = _Drawing()
    drawing.axes(chart)
    for curve in chart.curves:
        drawing.curve(curve)
    drawing.text((28, 22), title, INK, 26)
    drawing.keys(chart)
    image = drawing.image.resize(SIZE, Image.Resampling.BOX)
    image = image.quantize(64, Image.Quantize.FASTOCTREE)  # few colors: a small file
    with atomic_write(path) as partial:
        image.save(partial, format="png")


class _Drawing:
    """Draws in pixels of the image; everything is scaled here."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def axes(self, chart: Chart) -> None:
        left, top, right, bottom = BOX
        for text, place in chart.values.ticks:
            y = bottom - (bottom - top) * place / 100
            self.line([(left, y), (right, y)], GRID, 1)
            self.text((left - 12, y), text, MUTED, 18, "rm")
        for text, place in chart.steps.ticks:
            self.text((left + (right - left) * place / 100, bottom + 14), text, MUTED, 18, "mt")
        self.line([(left, bottom), (right, bottom)], MUTED, 1)
        self.text((right, bottom + 44), "step", MUTED, 18, "rt")
        for x in chart.gaps:
            self.line([self.place(x, 0), self.place(x, 14)], WARN, 3)

    def curve(self, curve: Curve) -> None:
        color = COLORS[curve.color % len(COLORS)]
        for part in curve.parts:
            points = [self.place(x, y) for x, y in part]
            self.line(points, _faint(color) if curve.kind == "raw" else color, 1 if curve.kind == "raw" else 3)
            if curve.has_marks or len(points) == 1:
                for x, y in points:
                    self.draw.ellipse([SCALE * (x - 5), SCALE * (y - 5), SCALE * (x + 5), SCALE * (y + 5)], color)

    def keys(self, chart: Chart) -> None:
        right: float = BOX[2]
        for line in reversed(chart.lines):
            name = line.name.encode("latin-1", "replace").decode("latin-1")  # the font has no other letters
            self.text((right, 37), name, MUTED, 20, "rm")
            right -= self.width(name, 20) + 34
            self.line([(right, 37), (right + 24, 37)], COLORS[line.color % len(COLORS)], 4)
            right -= 24

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = BOX
        return left + (right - left) * x / WIDTH, top + (bottom - top) * y / HEIGHT

    def line(self, points: list[tuple[float, float]], color: str, width: int) -> None:
        self.draw.line([(SCALE * x, SCALE * y) for x, y in points], color, SCALE * width, joint="curve")

    def text(self, place: tuple[float, float], text: str, color: str, size: int, anchor: str = "lt") -> None:
        font = ImageFont.load_default(SCALE * size)
        self.draw.text((SCALE * place[0], SCALE * place[1]), text, color, font, anchor)

    def width(self, text: str, size: int) -> float:
        return self.draw.textlength(text, ImageFont.load_default(SCALE * size)) / SCALE


def _faint(color: str) -> str:
    parts = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{(part + 2 * 255) // 3:02x}" for part in parts)
