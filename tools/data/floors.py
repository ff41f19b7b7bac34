"""Terrazzo floors: made-up pictures of stone chips in cement, with exact labels of four kinds.

One generator feeds three layouts under one root:

    images/{train,val}/NAME.png                the floors
    labels/{train,val}/NAME.png                class index of every pixel (0 cement, 1..5 the stones; 255 is not used)
    classes.json                               names, palette and ignore index of the labels
    annotations/instances_{train,val}.json     COCO: a box and a run-length mask for every chip, category ids 1..5
    chips/{train,val}/STONE/NAME.png           one chip per picture, one folder per stone

The stones share colours (white marble and white glass, black basalt and black glass, red granite and red jasper), so
that texture and outline must be seen to tell them apart. Everything follows from the seed; NumPy and Pillow are all it
needs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from terrazzo.errors import InputError
from terrazzo.tools.data import rle

STONES = ("marble", "granite", "basalt", "jasper", "glass")
CLASSES = ("cement", *STONES)
PALETTE = ((196, 190, 180), (240, 228, 66), (213, 94, 0), (0, 0, 0), (204, 60, 90), (0, 114, 178))
IGNORE_INDEX = 255
CHIP_SIZE = 64

_TILE = 192
_TILES_PER_STONE = 6
_OVERSAMPLE = 4
_MIN_AREA = 30
_TRIES = 30
_CHIPS_SAVED_PER_FLOOR = 4

# Outline of each stone: corners from .. to, longest over shortest axis from .. to, unevenness of the corners' radii.
_OUTLINES = {
    "marble": ((5, 7), (1.0, 1.5), 0.22),
    "granite": ((7, 9), (1.0, 1.3), 0.12),
    "basalt": ((10, 13), (1.0, 1.25), 0.05),
    "jasper": ((4, 6), (1.4, 2.2), 0.15),
    "glass": ((3, 4), (1.2, 2.0), 0.20),
}

_MARBLE = ((236, 233, 228), (205, 205, 208), (226, 196, 186), (186, 204, 188))
_MARBLE_VEINS = ((110, 112, 120), (140, 96, 80), (80, 100, 92))
_GRANITE = (
    ((178, 174, 170), (228, 226, 222), (70, 68, 70)),
    ((186, 120, 104), (222, 186, 172), (64, 56, 56)),
    ((132, 140, 150), (200, 206, 212), (48, 52, 60)),
)
_BASALT = ((58, 58, 62), (74, 70, 66), (46, 50, 58))
_JASPER = (((150, 56, 40), (204, 128, 74)), ((176, 108, 46), (228, 190, 120)), ((78, 92, 58), (150, 70, 48)))
_GLASS = ((40, 104, 160), (36, 130, 92), (196, 128, 34), (38, 38, 44), (222, 230, 228), (150, 40, 44))
_CEMENT = ((186, 182, 174), (214, 206, 192), (150, 150, 152), (204, 184, 172), (110, 112, 116))


@dataclass(frozen=True)
class Floor:
    """One picture and everything that is known about it.

    Attributes:
        image: (H, W, 3) uint8.
        labels: (H, W) uint8, indices into `CLASSES`.
        instances: (H, W) int32, 0 for cement, i + 1 for chip i.
        stones: index into `STONES` of each chip.
    """

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    stones: tuple[int, ...]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Left, top, width and height of each chip's visible pixels."""
        found = []
        for chip in range(len(self.stones)):
            rows, columns = np.nonzero(self.instances == chip + 1)
            left, top = int(columns.min()), int(rows.min())
            found.append((left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1))
        return found


class FloorMaker:
    """Makes floors from a seed: the n-th floor of the same seed and size is always the same picture."""

    def __init__(self, seed: int, size: int = 128):
        if size < 32:
            raise InputError(f"floors of size {size} are too small to hold chips; take at least 32")
        self.size = size
        self._random = np.random.default_rng(seed)
        self._tiles = {stone: [_TEXTURES[stone](self._random, n) for n in range(_TILES_PER_STONE)] for stone in STONES}

    def make(self) -> Floor:
        """The next floor."""
        random, size = self._random, self.size
        image = _cement(random, size)
        instances = np.zeros((size, size), np.int32)
        labels = np.zeros((size, size), np.uint8)
        blocked = np.zeros((size, size), bool)
        stones: list[int] = []
        crowding = random.uniform(0.45, 0.8)
        radii = np.sort(size * random.uniform(0.055, 0.17, size=60))[::-1]
        for radius in radii:
            if (labels > 0).mean() > crowding:
                break
            stone = int(random.integers(len(STONES)))
            placed = self._place(STONES[stone], radius, blocked)
            if placed is None:
                continue
            top, left, cover = placed
            window = np.s_[top : top + cover.shape[0], left : left + cover.shape[1]]
            chip = self._chip(STONES[stone], cover)
            image[window] += cover[..., None] * (chip - image[window])
            inside = cover >= 0.5
            stones.append(stone)
            instances[window][inside] = len(stones)
            labels[window][inside] = stone + 1
            _block(blocked, top, left, cover > 0)
        return Floor(_photograph(random, image), labels, instances, tuple(stones))

    def _place(self, stone: str, radius: float, blocked: np.ndarray) -> tuple[int, int, np.ndarray] | None:
        """Find room for a chip: its top, left and coverage (h, w) in 0..1; None if a few tries find none."""
        random, size = self._random, self.size
        outline = _outline(random, stone, radius)
        # Most tries fail on the spot: look at a few points of the chip before drawing it.
        probes = np.concatenate([outline * reach for reach in (0, 0.5, 1)])
        offsets = random.uniform(0, size, size=(_TRIES, 1, 2))
        places = np.clip(probes + offsets, 0, size - 1).astype(int)
        for offset in offsets[~blocked[places[..., 1], places[..., 0]].any(axis=1), 0]:
            corners = outline + offset
            left, top = np.maximum(np.floor(corners.min(0)).astype(int) - 2, 0)
            right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int) + 3, size)
            cover = _cover(corners - (left, top), bottom - top, right - left)
            free = not (blocked[top:bottom, left:right] & (cover > 0)).any()
            if free and (cover >= 0.5).sum() >= _MIN_AREA:
                return top, left, cover
        return None

    def _chip(self, stone: str, cover: np.ndarray) -> np.ndarray:
        """Stone for a chip, (h, w, 3): cut from one of the stone's tiles, with its own tone and a worn rim."""
        random = self._random
        height, width = cover.shape
        tile = self._tiles[stone][random.integers(_TILES_PER_STONE)]
        tile = np.rot90(tile, random.integers(4))
        if random.random() < 0.5:
            tile = tile[:, ::-1]
        top, left = random.integers(_TILE, size=2)
        rows, columns = (top + np.arange(height)) % _TILE, (left + np.arange(width)) % _TILE
        cut = tile[rows[:, None], columns]
        cut = cut * random.uniform(0.88, 1.1) + random.uniform(-6, 6, size=3)
        if stone == "glass":
            cut = cut + _sheen(random, height, width)
        rim = 1 - _blurred(cover, 1.6)
        return cut * (1 - 0.35 * np.clip(rim, 0, 1)[..., None])


def write_floors(root: str | Path, train: int = 200, val: int = 50, size: int = 128, seed: int = 0) -> Path:
    """Write floors in all three layouts.

    Args:
        root: folder to write into; made if it is not there.
        train: number of floors to train on.
        val: number of floors to evaluate on; none of them shares a tile of stone with a training floor.
        size: height and width in pixels.
        seed: the same seed gives the same files.

    Returns:
        `root` as a path.

    Raises:
        InputError: fewer than one floor in a split, or a size too small for chips.
    """
    root = Path(root)
    if train < 1 or val < 1:
        raise InputError(f"train is {train} and val is {val}; each must be at least 1")
    root.mkdir(parents=True, exist_ok=True)
    meta = {"classes": list(CLASSES), "palette": [list(colour) for colour in PALETTE], "ignore_index": IGNORE_INDEX}
    (root / "classes.json").write_text(json.dumps(meta, indent=2) + "\n")
    for position, (split, count) in enumerate((("train", train), ("val", val))):
        maker = FloorMaker(seed=2 * seed + position, size=size)
        _write_split(root, split, [maker.make() for _ in range(count)])
    return root


def _write_split(root: Path, split: str, floors: list[Floor]) -> None:
    for folder in (f"images/{split}", f"labels/{split}", "annotations", *(f"chips/{split}/{name}" for name in STONES)):
        (root / folder).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, floor in enumerate(floors):
        name = f"floor_{number:04d}"
        picture = Image.fromarray(floor.image)
        picture.save(root / "images" / split / f"{name}.png", compress_level=1)
        Image.fromarray(floor.labels).save(root / "labels" / split / f"{name}.png")
        height, width = floor.labels.shape
        images.append({"id": number + 1, "file_name": f"{name}.png", "height": height, "width": width})
        boxes = floor.boxes()
        for chip, (stone, box) in enumerate(zip(floor.stones, boxes)):
            mask = floor.instances == chip + 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": stone + 1,
                    "bbox": list(box),
                    "area": int(mask.sum()),
                    "segmentation": rle.encode(mask),
                    "iscrowd": 0,
                }
            )
        # The first chips are the largest.
        for chip in range(min(_CHIPS_SAVED_PER_FLOOR, len(boxes))):
            cut = picture.crop(_square_around(boxes[chip])).resize((CHIP_SIZE, CHIP_SIZE), Image.Resampling.BICUBIC)
            cut.save(root / "chips" / split / STONES[floor.stones[chip]] / f"{name}_{chip}.png", compress_level=1)
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(STONES)]
    record = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(record))


def _square_around(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    left, top, width, height = box
    half = round(0.58 * max(width, height))
    x, y = left + width // 2, top + height // 2
    return x - half, y - half, x + half, y + half


def _outline(random: np.random.Generator, stone: str, radius: float) -> np.ndarray:
    """Corners (n, 2) of a chip around the origin."""
    (fewest, most), (roundest, longest), uneven = _OUTLINES[stone]
    count = int(random.integers(fewest, most + 1))
    angles = (np.arange(count) + random.uniform(-0.3, 0.3, size=count)) * 2 * np.pi / count
    reach = radius * (1 + random.uniform(-uneven, uneven, size=count))
    stretch = np.sqrt(random.uniform(roundest, longest))
    points = np.stack([np.cos(angles) * reach * stretch, np.sin(angles) * reach / stretch], axis=1)
    turn = random.uniform(0, 2 * np.pi)
    return points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _cover(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Share of every pixel (height, width) that the polygon covers."""
    canvas = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners * _OVERSAMPLE], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255


def _block(blocked: np.ndarray, top: int, left: int, chip: np.ndarray) -> None:
    """Mark a chip (h, w) and the pixels up to two away from it as taken, in place."""
    height, width = chip.shape
    padded = np.pad(chip, 2)
    grown = np.asarray(Image.fromarray(padded).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    # Cut what hangs over the border of the floor.
    above, before = min(top, 2), min(left, 2)
    target = blocked[top - above : top + height + 2, left - before : left + width + 2]
    target |= grown[2 - above :, 2 - before :][: target.shape[0], : target.shape[1]]


def _blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """A (h, w) map of values in 0..1, blurred."""
    canvas = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def _noise(
    random: np.random.Generator, size: int, coarsest: float, finest: float, slope: float = 1.0, tilt: float = 1.0
) -> np.ndarray:
    """Smooth noise (size, size), mean 0, deviation 1, that repeats at its borders.

    Args:
        random: source of randomness.
        size: pixels a side.
        coarsest: longest wave length in pixels.
        finest: shortest wave length in pixels.
        slope: how fast short waves fade.
        tilt: above 1, waves along the first axis are that much shorter than along the second.
    """
    rows, columns = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    frequency = np.hypot(rows / tilt, columns)
    weight = np.where(
        (frequency >= 1 / coarsest) & (frequency <= 1 / finest), 1 / np.maximum(frequency, 1e-6) ** slope, 0
    )
    spectrum = np.fft.rfft2(random.standard_normal((size, size))) * weight
    field = np.fft.irfft2(spectrum, s=(size, size))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _nth(colours: tuple, number: int) -> np.ndarray:
    """Colour `number` (3,) of a row that starts again at its end."""
    return np.asarray(colours[number % len(colours)], dtype=np.float32)


def _mix(share: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3) between `first` (share 0) and `second` (share 1)."""
    return first + share[..., None] * (second - first)


def _marble(random: np.random.Generator, number: int) -> np.ndarray:
    """Pale, cloudy, with thin dark veins."""
    clouds = _noise(random, _TILE, 96, 12)
    veins = np.exp(-((_noise(random, _TILE, 64, 6, slope=1.6, tilt=1.8) / 0.09) ** 2))
    hair = 0.5 * np.exp(-((_noise(random, _TILE, 32, 5, slope=1.5) / 0.05) ** 2))
    stone = _nth(_MARBLE, number) + 7 * clouds[..., None]
    return _mix(np.clip(veins + hair, 0, 1) * 0.75, stone, _nth(_MARBLE_VEINS, number))


def _granite(random: np.random.Generator, number: int) -> np.ndarray:
    """Grains of three minerals, a few pixels each."""
    ground, pale, dark = (np.asarray(colour, np.float32) for colour in _GRANITE[number % len(_GRANITE)])
    first, second = _noise(random, _TILE, 9, 3, slope=0.5), _noise(random, _TILE, 8, 3, slope=0.5)
    stone = _mix(np.clip((first - 0.3) * 4, 0, 1), ground, pale)
    return _mix(np.clip((second - 0.75) * 4, 0, 1), stone, dark) + 5 * _noise(random, _TILE, 4, 2)[..., None]


def _basalt(random: np.random.Generator, number: int) -> np.ndarray:
    """Dark and dull, fine-grained, with a few pale pores."""
    pores = np.clip((_noise(random, _TILE, 7, 3, slope=0.5) - 2.0) * 3, 0, 1)
    stone = _nth(_BASALT, number) + 5 * _noise(random, _TILE, 5, 2, slope=0.3)[..., None]
    return _mix(0.6 * pores, stone, np.asarray((168, 164, 156), np.float32))


def _jasper(random: np.random.Generator, number: int) -> np.ndarray:
    """Wavy bands of two warm colours."""
    first, second = (np.asarray(colour, np.float32) for colour in _JASPER[number % len(_JASPER)])
    rows = np.arange(_TILE, dtype=np.float32)[:, None]
    bands = np.sin(2 * np.pi * rows * random.integers(12, 22) / _TILE + 2.2 * _noise(random, _TILE, 96, 16, slope=2))
    share = 0.5 + 0.5 * np.tanh(1.5 * bands + 0.4 * _noise(random, _TILE, 12, 4))
    return _mix(share, first, second)


def _glass(random: np.random.Generator, number: int) -> np.ndarray:
    """One clear colour, almost even."""
    return _nth(_GLASS, number) + 4 * _noise(random, _TILE, 96, 32, slope=2)[..., None]


# Each takes a source of randomness and the number of the tile, which chooses its colours; each gives (_TILE, _TILE, 3).
_TEXTURES = {"marble": _marble, "granite": _granite, "basalt": _basalt, "jasper": _jasper, "glass": _glass}


def _sheen(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Light on glass (height, width, 1): brighter to one side, with one bright streak."""
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    along = np.cos(angle) * rows + np.sin(angle) * columns
    streak = np.exp(-(((along - random.uniform(-0.3, 0.3)) / 0.12) ** 2))
    return (26 * along + 48 * streak)[..., None]


def _cement(random: np.random.Generator, size: int) -> np.ndarray:
    """The ground (size, size, 3): dull, with sand of two tones in it."""
    ground = _nth(_CEMENT, int(random.integers(len(_CEMENT)))) + random.uniform(-8, 8, size=3)
    ground = ground + 4 * _noise(random, size, 64, 8)[..., None]
    sand = _noise(random, size, 5, 2, slope=0.3)
    ground = ground - 40 * np.clip(sand - 1.7, 0, 1)[..., None] + 36 * np.clip(-sand - 1.8, 0, 1)[..., None]
    return ground.astype(np.float32)


def _photograph(random: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light, a lens that is not quite sharp, a noisy sensor: (H, W, 3) uint8."""
    size = image.shape[0]
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angle = random.uniform(0, 2 * np.pi)
    light = 1 + random.uniform(0.05, 0.22) * (np.cos(angle) * rows + np.sin(angle) * columns)
    light = light - 0.06 * (rows**2 + columns**2)
    warmth = 1 + random.uniform(-0.05, 0.05) * np.array([1, 0, -1])
    lit = np.clip(image * light[..., None] * warmth * random.uniform(0.85, 1.08), 0, 255).astype(np.uint8)
    soft = Image.fromarray(lit).filter(ImageFilter.GaussianBlur(random.uniform(0.2, 0.7)))
    grain = random.normal(0, random.uniform(1.5, 4.5), size=image.shape)
    return np.clip(np.asarray(soft, np.float32) + grain, 0, 255).astype(np.uint8)
