"""Drawings have the right size, with the right colours in the right places."""

import numpy as np
import pytest
from PIL import Image

from terrazzo.tools.predict import draw

GREY = Image.new("RGB", (80, 60), (120, 120, 120))


def test_palette_prefers_the_data_sets_own():
    own = [[1, 2, 3], [4, 5, 6]]
    assert draw.palette(2, own) == [(1, 2, 3), (4, 5, 6)]
    assert len(set(draw.palette(40, own))) == 40


def test_label_overlay_tints_where_the_label_is():
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:] = 1
    drawn = np.asarray(draw.label_overlay(GREY, labels, ("a", "b"), [(255, 0, 0), (0, 0, 255)], {"a": 0.5, "b": 0.5}))
    assert drawn.shape[0] > 60
    assert drawn[30, 10, 0] > drawn[30, 10, 2]
    assert drawn[30, 70, 2] > drawn[30, 70, 0]


def test_label_overlay_outlines_segments_of_one_class():
    segments = np.ones((60, 80), np.uint16)
    segments[:, 40:] = 2
    plain, outlined = (
        np.asarray(draw.label_overlay(GREY, np.zeros((60, 80), np.uint8), ("a",), [(255, 0, 0)], {"a": 1.0}, numbers))
        for numbers in (None, segments)
    )
    assert (plain[:60] == plain[0, 0]).all()
    assert (outlined[:60, 39] == 250).all()
    assert (outlined[:60, 41] == plain[0, 0]).all()


def test_unknown_labels_are_grey():
    assert draw.colour_map(np.array([[255, 0]], np.uint8), [(9, 9, 9)]).tolist() == [[[128] * 3, [9] * 3]]


@pytest.mark.parametrize("box", [(0, 0, 79, 59), (-5, -5, 200, 200), (70, 1, 79, 4), (10, 10, 10, 10)])
def test_boxes_at_borders_and_without_area(box):
    masks = np.zeros((1, 60, 80), bool)
    masks[0, 20:30, 20:30] = True
    drawn = draw.box_overlay(GREY, np.array([box], float), ["a long tag 0.99"], [(255, 255, 0)], masks)
    assert drawn.size == GREY.size
    assert np.asarray(drawn)[25, 25, 2] < 120


def test_the_surest_tag_is_in_sight():
    boxes, colours = np.array([[10, 30, 60, 60], [12, 32, 62, 62]], float), [(255, 255, 0), (0, 0, 255)]
    both = np.asarray(draw.box_overlay(GREY, boxes, ["sure", "unsure"], colours))
    alone = np.asarray(draw.box_overlay(GREY, boxes[:1], ["sure"], colours[:1]))
    assert np.array_equal(both[18:28, 11:30], alone[18:28, 11:30])


@pytest.mark.parametrize("size", [(1, 1), (16, 200), (900, 30)])
def test_odd_pictures_get_captions(size):
    drawn = draw.caption_bars(Image.new("RGB", size), [("a rather long class name", 0.9), ("b", 0.0)])
    assert drawn.width == size[0]
    assert drawn.height > size[1]


def test_grid():
    sheet = draw.grid([[GREY, GREY], [GREY, GREY], [GREY, GREY]], ("one", "two"), [("a", (1, 1, 1))])
    assert sheet.width > 160
    assert sheet.height > 180
