"""supervision: detections from the records of `terrazzo infer`."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import terrazzo
from terrazzo.errors import InputError
from terrazzo.integrations.supervision import classifications, detections
from terrazzo.tools.predict.draw import palette
from terrazzo.tools.predict.prediction import (
    Things,
    box_prediction,
    class_prediction,
    label_prediction,
    panoptic_prediction,
)

supervision = pytest.importorskip("supervision", reason="needs the extra 'ecosystem'")

NAMES = ["tile", "crack", "grout"]
PICTURE = Image.new("RGB", (40, 30), (90, 120, 60))
BOXES = np.array([[2, 3, 12, 13], [20, 10, 35, 25]], np.float32)


def boxes(masks=True):
    pixels = np.zeros((2, 30, 40), bool)
    pixels[0, 3:13, 2:12], pixels[1, 10:25, 20:35] = True, True
    scores = torch.tensor([0.9, 0.5], dtype=torch.float64)
    things = Things(torch.from_numpy(BOXES), torch.tensor([1, 0]), scores, torch.from_numpy(pixels) if masks else None)
    return box_prediction(PICTURE, things, NAMES, palette(3), 0.3)


def segments():
    values = np.zeros((30, 40), int)
    values[:, 20:] = 1 + 1000  # the first crack
    values[20:, :] = 2
    return panoptic_prediction(PICTURE, values, 1000, 2, NAMES, palette(3))


@pytest.mark.parametrize("masks", [True, False])
def test_boxes(masks):
    prediction = boxes(masks)
    found = detections(prediction.record)
    np.testing.assert_array_equal(found.xyxy, BOXES)
    assert (found.class_id.tolist(), found.confidence.tolist()) == ([1, 0], [0.9, 0.5])
    assert found.data["class_name"].tolist() == ["crack", "tile"]
    assert (found.mask is not None) == masks
    if masks:
        np.testing.assert_array_equal(supervision.mask_to_xyxy(found.mask)[0], [2, 3, 11, 12])
    drawn = supervision.BoxAnnotator().annotate(np.asarray(PICTURE).copy(), found)
    assert (drawn != np.asarray(PICTURE)).any()


def test_nothing_found():
    record = {"task": "detection", "min_score": 0.3, "things": []}
    assert detections(record).is_empty()


def test_segments_of_a_prediction_and_of_the_files(tmp_path):
    prediction = segments()
    found = detections(prediction)
    assert found.confidence is None
    assert found.data["class_name"].tolist() == [entry["label"] for entry in prediction.record["segments"]]
    assert found.mask.sum(0).tolist() == np.ones((30, 40), int).tolist()
    (tmp_path / "floor.json").write_text(json.dumps(prediction.record))
    Image.fromarray(prediction.segments).save(tmp_path / "floor.segments.png")
    again = detections(tmp_path / "floor.json")
    np.testing.assert_array_equal(again.mask, found.mask)
    np.testing.assert_array_equal(again.xyxy, found.xyxy)


def test_classes_of_a_segmentor():
    labels = np.zeros((30, 40), int)
    labels[10:20, 5:15] = 2
    prediction = label_prediction(PICTURE, labels, NAMES, palette(3))
    found = detections(prediction.record, prediction.labels)
    assert (found.class_id.tolist(), found.mask[1].sum()) == ([0, 2], 100)
    assert found.xyxy[1].tolist() == [5, 10, 14, 19]


def test_a_classifier():
    prediction = class_prediction(PICTURE, np.array([0.2, 0.7, 0.1]), NAMES)
    found = classifications(prediction)
    assert (found.class_id.tolist(), found.confidence.tolist()) == ([1, 0, 2], [0.7, 0.2, 0.1])


def test_what_a_predictor_gives():
    model = timm.create_model("s2aformer_mini", num_classes=3)
    prediction = terrazzo.Predictor(model, device="cpu")(PICTURE)
    assert classifications(prediction).class_id.tolist() == [entry["index"] for entry in prediction.record["top"]]


def test_refusals():
    classes, panoptic = class_prediction(PICTURE, np.array([0.2, 0.8]), NAMES).record, segments().record
    with pytest.raises(InputError, match=r"use classifications\(record\)"):
        detections(classes)
    with pytest.raises(InputError, match=r"use detections\(record\)"):
        classifications(panoptic)
    with pytest.raises(InputError, match=r"needs its map: give the array of the .labels.png or .segments.png"):
        detections(panoptic)
