"""Results drawn on pictures: a caption with bars, a coloured label map with a legend, boxes with masks, and grids."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


class Mask(NamedTuple):
    """The mask of one thing in a part of a picture; it is false elsewhere.

    Attributes:
        pixels: (h, w) booleans.
        left, top: where the part begins.
    """

    pixels: np.ndarray
    left: int
    top: int


def whole_or_part(mask: np.ndarray | Mask) -> Mask:
    """A mask (H, W) of the whole picture as a `Mask`, and a `Mask` as it is."""
    return mask if isinstance(mask, Mask) else Mask(mask, 0, 0)


_INK = (240, 240, 240)
PAPER = (28, 28, 32)
_BAR = (78, 121, 167)

# Colours that most people can tell apart, for data sets without colours.
_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (148, 103, 189),
    (140, 86, 75),
    (127, 201, 127),
)


def palette(count: int, given: Sequence[Sequence[int]] | None = None) -> list[Colour]:
    """`count` colours: the given ones, if there are enough, else distinct ones of our own."""
    if given is not None and len(given) >= count:
        return [tuple(int(part) for part in colour) for colour in given[:count]]
    colours = list(_COLOURS)
    random = np.random.default_rng(0)
    while len(colours) < count:
        colours.append(tuple(int(part) for part in random.integers(40, 236, size=3)))
    return colours[:count]


def caption_bars(image: Image.Image, lines: Sequence[tuple[str, float]]) -> Image.Image:
    """The picture with a strip below it: one text and bar for each (label, share in 0..1)."""
    text = _text_size(image.size)
    font, row = _font(text), round(text * 1.7)
    strip = Image.new("RGB", (image.width, row * len(lines) + text), PAPER)
    pen = ImageDraw.Draw(strip)
    number_width = pen.textlength("100.0 %", font=font)
    bar_width = image.width * 0.25
    for index, (label, share) in enumerate(lines):
        top = text // 2 + index * row
        left = text
        pen.rectangle((left, top + text * 0.25, left + max(bar_width * share, 2), top + text * 1.15), fill=_BAR)
        left += bar_width + text * 0.6
        pen.text((left, top), f"{share:.1%}".replace("%", " %"), font=font, fill=_INK)
        left += number_width + text * 0.6
        pen.text((left, top), _fitted(pen, label, font, image.width - left - text), font=font, fill=_INK)
    return _stacked(image, strip)


def label_overlay(
    image: Image.Image,
    labels: np.ndarray,
    names: Sequence[str],
    colours: Sequence[Colour],
    shares: dict[str, float],
    segments: np.ndarray | None = None,
) -> Image.Image:
    """The picture under its label map, with outlines, and a legend of the classes in `shares` below.

    Args:
        image: H x W.
        labels: (H, W) indices into `names`.
        names: class names.
        colours: class colours.
        shares: the classes to name in the legend and the part of the picture that each fills, in 0..1.
        segments: (H, W) numbers of segments, to outline each of them; None outlines the classes.
    """
    canvas = tinted(image, labels, colours, segments)
    entries = [(name, f"{name} {share:.0%}".replace("%", " %")) for name, share in shares.items()]
    by_name = dict(zip(names, colours))
    return _stacked(Image.fromarray(canvas), _legend(image, [(text, by_name[name]) for name, text in entries]))


def tinted(
    image: Image.Image, labels: np.ndarray, colours: Sequence[Colour], segments: np.ndarray | None = None
) -> np.ndarray:
    """(H, W, 3) uint8: the picture under its label map, with outlines; as `label_overlay`."""
    canvas = (0.45 * np.asarray(image, np.float32) + 0.55 * colour_map(labels, colours)).astype(np.uint8)
    canvas[outlines(labels if segments is None else segments)] = (250, 250, 250)
    return canvas


def box_overlay(
    image: Image.Image,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[Colour],
    masks: np.ndarray | Sequence[Mask] | None = None,
    top: int = 0,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The picture with boxes, tags and masks; a tag that would cover the tag of a surer box is left out.

    Args:
        image: H x W.
        boxes: (N, 4) left, top, right, bottom.
        texts: N tags, the surest boxes first.
        colours: N colours.
        masks: (N, H, W) booleans, or N masks of parts of the picture, or None.
        top, size: the first row of `image` in a larger picture, and its width and height; boxes and
            masks are in that picture's pixels.
    """
    size = size or image.size
    canvas = np.array(image)
    if masks is not None:
        parts = [whole_or_part(mask) for mask in masks]
        # Small things are drawn last, so that they stay visible.
        for index in np.argsort([-part.pixels.sum() for part in parts], kind="stable"):
            _lay(canvas, parts[index], top, colours[index])
    drawn = Image.fromarray(canvas)
    pen = ImageDraw.Draw(drawn)
    text = max(11, round(_text_size(size) * 0.8))
    font, stroke = _font(text), max(2, round(min(size) / 300))
    # Every tag comes after every box, so that no line crosses a text.
    things = list(zip(boxes.tolist(), texts, colours))
    for (left, upper, right, lower), _, colour in things[::-1]:
        pen.rectangle((left, upper - top, max(right, left), max(lower, upper) - top), outline=colour, width=stroke)
    taken: list[tuple[float, float, float, float]] = []
    for (left, upper, _, _), tag, colour in things:
        high, wide = text * 1.35, pen.textlength(tag, font=font) + text * 0.6
        # The tag sits on the box, or inside it at the upper border of the picture.
        upper = upper - high if upper >= high else max(upper, 0)
        left = min(max(left, 0), max(size[0] - wide, 0))
        place = (left, upper, left + wide, upper + high)
        if any(place[0] < a[2] and a[0] < place[2] and place[1] < a[3] and a[1] < place[3] for a in taken):
            continue
        taken.append(place)
        pen.rectangle((left, upper - top, left + wide, upper - top + high), fill=colour)
        pen.text((left + text * 0.3, upper - top + text * 0.08), tag, font=font, fill=_readable_on(colour))
    return drawn


def _lay(canvas: np.ndarray, mask: Mask, top: int, colour: Colour) -> None:
    """Tint the pixels of a mask, and outline it; the canvas begins at row `top` of the picture."""
    pixels, left, first = mask
    above = max(top - first, 0)  # rows of the mask above the canvas
    start, end = first + above - top, min(first - top + pixels.shape[0], canvas.shape[0])
    if start >= end:
        return
    shown = slice(above, above + end - start)
    inside, edge = pixels[shown], (outlines(pixels) & pixels)[shown]
    under = canvas[start:end, left : left + pixels.shape[1]]
    under[inside] = (0.5 * under[inside] + 0.5 * np.array(colour)).astype(np.uint8)
    under[edge] = colour


def colour_map(labels: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """(H, W, 3) uint8 of a label map; indices without a colour, such as 255, are grey."""
    table = np.full((256, 3), 128, np.uint8)
    table[: len(colours)] = np.asarray(colours[:256], np.uint8)
    return table[np.minimum(labels, 255)]


def outlines(labels: np.ndarray) -> np.ndarray:
    """(H, W) booleans: where a pixel's right or lower neighbour has another value."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def grid(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], legend: Sequence[tuple[str, Colour]]
) -> Image.Image:
    """Pictures of one size in rows and columns, with a title on each column and a legend below.

    Args:
        rows: the pictures, each row as long as `titles`.
        titles: what the columns show.
        legend: class names and colours.
    """
    width, height = rows[0][0].size
    gap, text = max(6, width // 40), max(12, width // 16)
    head = round(text * 1.8)
    sheet = Image.new("RGB", (len(titles) * (width + gap) + gap, len(rows) * (height + gap) + head), PAPER)
    pen, font = ImageDraw.Draw(sheet), _font(text)
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        pen.text((left, text * 0.3), _fitted(pen, title, font, width), font=font, fill=_INK)
        for line, row in enumerate(rows):
            sheet.paste(row[column], (left, head + line * (height + gap)))
    return _stacked(sheet, _legend(sheet, legend, text))


def panels(pictures: Sequence[Image.Image], titles: Sequence[str], columns: int = 4) -> Image.Image:
    """Pictures of one size in reading order, a title on each."""
    width, height = pictures[0].size
    gap, text = max(6, width // 40), max(12, width // 20)
    columns, head = min(columns, len(pictures)), round(text * 1.8)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (head + height + gap)), PAPER)
    pen, font = ImageDraw.Draw(sheet), _font(text)
    for index, (picture, title) in enumerate(zip(pictures, titles)):
        row, column = divmod(index, columns)
        left, top = gap + column * (width + gap), row * (head + height + gap)
        pen.text((left, top + text * 0.3), _fitted(pen, title, font, width), font=font, fill=_INK)
        sheet.paste(picture, (left, top + head))
    return sheet


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The picture in its shape, with `side` pixels on its longer side; as it is if that has fewer."""
    if max(image.size) <= side:
        return image
    small = image.copy()
    small.thumbnail((side, side))
    return small


def legend_height(size: tuple[int, int], texts: Sequence[str]) -> int:
    """Pixels of the strip that a legend of these texts adds to a picture of a size, (width, height)."""
    return _legend(Image.new("1", size), [(text, _INK) for text in texts]).height


def _legend(image: Image.Image, entries: Sequence[tuple[str, Colour]], text: int | None = None) -> Image.Image:
    """A strip as wide as the picture with a swatch and a text for each entry, in as many lines as it takes."""
    text = text or _text_size(image.size)
    font, row = _font(text), round(text * 1.7)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, left, line = [], text, 0
    for name, colour in entries:
        name = _fitted(ruler, name, font, image.width - 4 * text)
        wide = text * 1.4 + ruler.textlength(name, font=font) + text
        if left + wide > image.width and left > text:
            left, line = text, line + 1
        places.append((left, line, name, colour))
        left += wide
    strip = Image.new("RGB", (image.width, row * (line + 1) + text), PAPER)
    pen = ImageDraw.Draw(strip)
    for left, line, name, colour in places:
        top = text // 2 + line * row
        pen.rectangle((left, top + text * 0.2, left + text, top + text * 1.2), fill=colour, outline=_INK)
        pen.text((left + text * 1.4, top), name, font=font, fill=_INK)
    return strip


def _stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (upper.width, upper.height + lower.height), PAPER)
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height))
    return sheet


def _text_size(size: tuple[int, int]) -> int:
    return max(11, round(min(size) / 32))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with dots if it is wider than `width`."""
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text}..."


def _readable_on(colour: Colour) -> Colour:
    """Black on light colours, white on dark ones."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
