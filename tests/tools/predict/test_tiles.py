"""Tiles: exact where they promise it, blended where asked for, and things across edges are found once."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from timm.layers import SqueezeExcite
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, pad

from terrazzo.errors import InputError
from terrazzo.tools.data import rle
from terrazzo.tools.data.windows import WholePicture
from terrazzo.tools.predict import draw, files
from terrazzo.tools.predict.prediction import Things
from terrazzo.tools.predict.tiles.boxes import BoxTiles
from terrazzo.tools.predict.tiles.engine import check_tiles, tile_engine
from terrazzo.tools.predict.tiles.grid import lay, weights
from terrazzo.tools.predict.tiles.reach import measured_reach
from terrazzo.tools.predict.tiles.segments import SegmentTiles


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def silent(done, total):
    pass


class Segmentor:
    """Three classes from a model of stride 4."""

    names = ["a", "b", "c"]

    def __init__(self, model):
        self.model = model

    def inputs(self, images, size):
        arrays = [torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 255 - 0.5 for image in images]
        return torch.stack([pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1])) for x in arrays])

    def logits(self, inputs):
        return interpolate(self.model(inputs), inputs.shape[2:], mode="bilinear")

    def labels(self, logits):
        return logits.argmax(1)

    def classes(self):
        return self.names, draw.palette(3)


class Contrast(nn.Module):
    """Looks at the whole map, and is unknown to `terrazzo.spatial`."""

    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


def network(*more):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.Tanh(), nn.Conv2d(8, 8, 3, 2, 1, bias=False)]
    layers = [*stem, *more, nn.Conv2d(8, 3, 3, padding=1, bias=False)]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    model.align_corners = False
    return model


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "unit"), [(1000, 256, 64, 1), (257, 256, 0, 1), (999, 256, 128, 32), (50, 256, 64, 1)]
)
def test_spans_cover_an_axis_once(length, tile, overlap, unit):
    spans = lay(length, length, tile, overlap, unit=unit).rows
    assert [span.first for span in spans] == [0, *(span.last for span in spans[:-1])]
    assert spans[-1].last == length
    assert all(span.start % unit == 0 and span.start <= span.first < span.last <= span.end for span in spans)
    assert {span.end - span.start for span in spans} == {min(tile, length)}
    for one, other in itertools.pairwise(spans):
        seam = one.last
        assert min(seam - other.start, one.end - seam) >= overlap // 2
    ramp = min(overlap, tile // 3)
    total = torch.zeros(spans[-1].end)
    for index, span in enumerate(spans):
        total[span.start : span.end] += weights(spans, index, ramp // 2 * 2)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("size", [(448, 320), (301, 419), (515, 100)])
@pytest.mark.parametrize(("more", "how"), [((), "exact"), ((SqueezeExcite(8),), "rows")])
def test_auto_gives_the_labels_of_the_whole_picture(size, more, how):
    image, segmentor = noise(*size), Segmentor(network(*more))
    long = [-(-side // 32) * 32 for side in size[::-1]]
    wanted = segmentor.logits(segmentor.inputs([image], long)).argmax(1)[0, : size[1], : size[0]]
    tiles = SegmentTiles(segmentor, 256, "auto", segmentor.model)
    assert (tiles.note is None) if how == "exact" else ("run on 256 rows at a time instead" in tiles.note)
    prediction = tiles.predict(WholePicture("noise", image), 2, silent)
    assert prediction.record["tiles"]["how"] == how
    assert len(np.unique(wanted)) == 3
    assert (prediction.labels != wanted.numpy()).mean() < 1e-4  # logits may be equal up to rounding
    if how == "exact":
        assert prediction.record["tiles"]["overlap"] == 128


def test_seams_are_seen_where_tiles_do_not_overlap():
    image, segmentor = noise(512, 256), Segmentor(network())
    wanted = segmentor.logits(segmentor.inputs([image], (256, 512))).argmax(1)[0].numpy()
    labels = SegmentTiles(segmentor, 256, 0).predict(WholePicture("noise", image), 1, silent).labels
    differing = np.flatnonzero((labels != wanted).any(0))
    assert len(differing)
    assert differing.min() >= 256 - 16
    assert differing.max() < 256 + 16


@pytest.mark.parametrize("overlap", ["blend", 0])
def test_inference_mode_ends_with_each_band(overlap):
    segmentor, seen = Segmentor(network()), []
    logits = segmentor.logits
    segmentor.logits = lambda inputs: seen.append(torch.is_inference_mode_enabled()) or logits(inputs)
    for band in SegmentTiles(segmentor, 64, overlap).run(WholePicture("noise", noise(100, 150)), 1, silent).bands:
        assert band.values.is_inference()
        assert not torch.is_inference_mode_enabled()
    assert seen
    assert all(seen)


def test_auto_refuses_a_model_that_is_not_known_and_looks_too_far():
    segmentor = Segmentor(network(Contrast()))
    with pytest.raises(
        InputError, match=r"looks too far or its results depend on where a tile begins, and .*Contrast.*--overlap blend"
    ):
        SegmentTiles(segmentor, 256, "auto", segmentor.model)
    with pytest.raises(InputError, match=r"stride, 32: use --tile 256"):
        SegmentTiles(segmentor, 250, "auto", segmentor.model)
    with pytest.raises(InputError, match="does not say how far"):
        SegmentTiles(segmentor, 256, "auto")


class Unknown(nn.Sequential):
    """Local, but with a forward pass of its own that `terrazzo.spatial` does not know."""

    def forward(self, x):
        return super().forward(x)


def test_auto_says_what_large_overlaps_cost():
    segmentor = Segmentor(Unknown(*network()))
    tiles = SegmentTiles(segmentor, 192, "auto", segmentor.model)
    assert "looks 64 pixels far, so pixels are computed 9.0 times" in tiles.note
    image = noise(256, 224)
    wanted = segmentor.logits(segmentor.inputs([image], (224, 256))).argmax(1)[0].numpy()
    assert (tiles.predict(WholePicture("noise", image), 1, silent).labels != wanted).mean() < 1e-4


def test_reach_depends_on_where_tiles_begin():
    def pooled(side):
        return lambda x: x - interpolate(avg_pool2d(x, side), x.shape[2:])

    assert measured_reach(pooled(16), 192, 32) == 32
    assert measured_reach(pooled(24), 192, 32) is None
    assert measured_reach(lambda x: x - x.mean((2, 3), keepdim=True), 192, 32) is None


class Sides(Segmentor):
    """Finds class 0 on the left of tiles at the left edge of the picture, and class 1 elsewhere, equally sure."""

    def __init__(self):
        pass

    def logits(self, inputs):
        first = inputs[:, :1, :1, :1] < 0
        found = torch.where(first, 1.0, -1.0) * torch.ones_like(inputs[:, :1])
        return torch.cat([found, -found, torch.full_like(found, -30.0)], 1)


def test_blending_and_hard_seams_meet_in_the_middle_and_disagreement_is_counted():
    pixels = np.full((40, 160, 3), 255, np.uint8)
    pixels[:, :1] = 0
    picture = WholePicture("sides", Image.fromarray(pixels))
    blended = SegmentTiles(Sides(), 100, "blend").predict(picture, 2, silent)
    seam = (60 + 100) // 2
    for prediction in (blended, SegmentTiles(Sides(), 100, 10).predict(picture, 1, silent)):
        assert (prediction.labels[:, :seam] == 0).all()
        assert (prediction.labels[:, seam:] == 1).all()
        assert prediction.record["shares"] == {"a": 0.5, "b": 0.5}
    facts = blended.record["tiles"]
    assert {key: facts[key] for key in ("how", "size", "overlap", "count")} == {
        "how": "blend",
        "size": 100,
        "overlap": 25,
        "count": 2,
    }
    assert facts["disagreement"]["labels"] == 1
    assert facts["disagreement"]["probabilities"] == pytest.approx(2 / 3 * np.tanh(1), abs=1e-4)


def test_blended_tiles_that_agree_give_the_whole_picture():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 1).requires_grad_(False)
    image, segmentor = noise(130, 170), Segmentor(model)
    wanted = segmentor.logits(segmentor.inputs([image], (170, 130))).argmax(1)[0].numpy()
    told = []
    tiles = SegmentTiles(segmentor, 64, "blend")
    prediction = tiles.predict(WholePicture("noise", image), 2, lambda done, total: told.append((done, total)))
    assert (prediction.labels != wanted).mean() < 1e-3
    assert prediction.record["tiles"]["disagreement"] == {"labels": 0, "probabilities": pytest.approx(0, abs=1e-6)}
    count = prediction.record["tiles"]["count"]
    assert told[-1] == (count, count)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_pictures_smaller_than_a_tile_are_whole():
    segmentor = Segmentor(network())
    image = noise(91, 67)
    wanted = segmentor.logits(segmentor.inputs([image], (67, 91))).argmax(1)[0].numpy()
    for overlap in ("auto", "blend", 8):
        prediction = SegmentTiles(segmentor, 256, overlap, segmentor.model).predict(
            WholePicture("small", image), 4, silent
        )
        assert np.array_equal(prediction.labels, wanted)
        assert prediction.record["tiles"] == {"how": "whole"}


class Blobs:
    """Finds connected bright pixels: boxes and masks; blue ones are of class 1."""

    min_score, iou_threshold = 0.3, 0.5

    def __init__(self, masks=True):
        self.masks = masks

    def things(self, images):
        return [self._of(np.asarray(image)) for image in images]

    def _of(self, pixels):
        parts, count = ndimage.label(pixels.max(2) > 0)
        masks = np.stack([parts == number for number in range(1, count + 1)]) if count else np.zeros((0, *parts.shape))
        places = ndimage.find_objects(parts)
        boxes = [[x.start, y.start, x.stop, y.stop] for y, x in places]
        labels = [int(pixels[mask].max(0)[0] == 0) for mask in masks]
        scores = torch.linspace(0.9, 0.4, count)
        own = torch.from_numpy(masks).bool() if self.masks else None
        return Things(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels).long(), scores, own)

    def classes(self):
        return ["white", "blue"], draw.palette(2)


def blobs():
    """A picture, and boxes of its things: in one tile, on a seam, across two tiles' edges, at the picture's edge."""
    pixels = np.zeros((150, 230, 3), np.uint8)
    boxes = [
        (5, 5, 20, 25),
        (70, 30, 95, 50),
        (74, 70, 90, 84),
        (0, 90, 12, 110),
        (150, 60, 168, 90),
        (215, 130, 230, 150),
    ]
    for number, (left, top, right, bottom) in enumerate(boxes):
        pixels[top:bottom, left:right] = (0, 0, 255) if number % 2 else 255
    return pixels, boxes


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_things_across_edges_are_found_once_and_whole(masks, batch):
    pixels, boxes = blobs()
    tiles = BoxTiles(Blobs(masks), 96, 32)
    prediction = tiles.predict(WholePicture("blobs", Image.fromarray(pixels)), batch, silent)
    things = prediction.record["things"]
    assert sorted(thing["box"] for thing in things) == sorted([*map(float, box)] for box in boxes)
    assert [thing["score"] for thing in things] == sorted((thing["score"] for thing in things), reverse=True)
    for thing in things:
        left, top, right, bottom = map(int, thing["box"])
        assert thing["label"] == ("white" if pixels[top, left, 0] else "blue")
        if masks:
            wanted = np.zeros(pixels.shape[:2], bool)
            wanted[top:bottom, left:right] = True
            assert np.array_equal(rle.decode(thing["mask"]), wanted)
    facts = prediction.record["tiles"]
    assert (facts["how"], facts["size"], facts["overlap"]) == ("boxes", 96, 32)
    assert facts["cut"] > 0
    assert facts["duplicates"] > 0
    whole = BoxTiles(Blobs(masks), 300, 32).predict(WholePicture("blobs", Image.fromarray(pixels)), 1, silent)
    assert np.array_equal(np.asarray(whole.drawing)[..., 0] > 0, np.asarray(prediction.drawing)[..., 0] > 0)


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (40, 48), (64, 64)])
def test_files_of_a_fixed_size_do_not_stretch_pictures_smaller_than_a_tile(size):
    """Edge pixels pad the picture; a thing that goes on there ends with the picture, and another is left out."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    boxes = [(5, 10, 11, 14), (20, height - 8, 25, height), (width - 8, 20, width, 25)]
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = 255

    def run(images):
        found = Blobs().things([Image.fromarray(images[0].permute(1, 2, 0).byte().numpy())])[0]
        padding = torch.tensor([[62.0, 62.0, 64.0, 64.0]] if min(size) < 64 else []).reshape(-1, 4)
        more = len(padding)
        masks = torch.cat([found.masks.float(), torch.ones(more, 64, 64)])
        labels, scores = (
            torch.cat([found.labels, torch.zeros(more)]),
            torch.cat([found.scores, torch.full((more,), 0.5)]),
        )
        return torch.cat([found.boxes, padding]), labels.long(), scores, masks

    facts = {"task": "detection", "preparation": "{}", "outputs": "boxes, labels, scores, masks"}
    tiles = tile_engine(files.predictor(run, facts, (64, 64)), 64, 32)
    found, masks, _ = tiles.found(WholePicture("small", Image.fromarray(pixels)), 1, silent)
    assert sorted(map(tuple, found.boxes.tolist())) == sorted(boxes)
    for box, mask in zip(found.boxes.int().tolist(), masks):
        assert (mask.left, mask.top) == tuple(box[:2])
        assert mask.pixels.sum() == (box[2] - box[0]) * (box[3] - box[1])


def test_a_picture_without_things():
    empty = WholePicture("black", Image.new("RGB", (150, 110)))
    record = BoxTiles(Blobs(), 64, 16).predict(empty, 3, silent).record
    assert record["things"] == []


def test_boxes_are_drawn_band_by_band_as_at_once():
    pixels, _ = blobs()
    image = Image.fromarray(pixels)
    things, masks, _ = BoxTiles(Blobs(), 96, 32).found(WholePicture("blobs", image), 1, silent)
    arguments = (things.boxes.numpy(), ["a thing"] * len(things.boxes), draw.palette(len(things.boxes)), masks)
    once = np.asarray(draw.box_overlay(image, *arguments))
    bands = [
        np.asarray(draw.box_overlay(image.crop((0, top, 230, min(top + 40, 150))), *arguments, top, image.size))
        for top in range(0, 150, 40)
    ]
    assert np.array_equal(np.concatenate(bands), once)


@pytest.mark.parametrize(
    ("tile", "overlap", "words"),
    [
        (None, 8, "--tile"),
        (0, None, "at least 1"),
        (64, 64, "from 0 to 63"),
        (64, -1, "from 0 to 63"),
        (64, "half", "auto, blend or pixels"),
    ],
)
def test_refused_tiles(tile, overlap, words):
    with pytest.raises(InputError, match=words):
        check_tiles(tile, overlap)


def test_refused_engines():
    for engine, overlap, words in (
        (Blobs(), "auto", "is for segmentors"),
        (Blobs(), "blend", "is for segmentors"),
        (object(), None, "this is a panoptic segmentor"),
        (Segmentor(network()), None, "gives no logits for tiles"),
    ):
        with pytest.raises(InputError, match=words):
            tile_engine(engine, 64, overlap)
