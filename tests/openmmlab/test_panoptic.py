"""The replacement of panopticapi: quality by hand and by torchmetrics, numbers as colours, precedence."""

import importlib
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import run_code

import terrazzo.openmmlab  # noqa: F401
from terrazzo.openmmlab import _panoptic

CATEGORIES = {number: {"id": number, "isthing": int(number < 3)} for number in range(1, 6)}


def annotation(segments):
    """COCO's entry for a picture, from its segments {number: category}; mmdet reads only these keys."""
    return {
        "image_id": 0,
        "file_name": "0.png",
        "segments_info": [{"id": number, "category_id": kind, "iscrowd": 0} for number, kind in segments.items()],
    }


def score(folder, truth, prediction):
    """mmdet's statistics of a picture; truth and prediction are pairs of numbers (H, W) and the numbers' categories."""
    from mmdet.evaluation.functional import pq_compute_single_core

    entries = []
    for kind, (numbers, segments) in (("truth", truth), ("prediction", prediction)):
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(_panoptic.id2rgb(numbers)).save(folder / kind / "0.png")
        entries.append(annotation(segments))
        if kind == "truth":
            for segment in entries[-1]["segments_info"]:
                segment["area"] = int((numbers == segment["id"]).sum())
    return pq_compute_single_core(0, [tuple(entries)], str(folder / "truth"), str(folder / "prediction"), CATEGORIES)


def test_quality_by_hand(tmp_path):
    """In a picture of 1x40, a thing is found, a thing is missed, a thing replaces stuff, and other stuff is right."""
    truth, prediction = np.zeros((1, 40), np.int32), np.zeros((1, 40), np.int32)
    truth[0, :9], prediction[0, 1:10] = 7, 300  # 8 common pixels; the pixel beyond segment 7 is void and in no union
    truth[0, 12:20] = 70_000  # this thing is missed
    prediction[0, 22:26] = truth[0, 22:26] = 5  # stuff of category 5, predicted as a thing of category 1
    truth[0, 26:], prediction[0, 26:] = 9, 2
    found = score(tmp_path, (truth, {7: 1, 70_000: 1, 5: 5, 9: 4}), (prediction, {300: 1, 5: 1, 2: 4}))
    assert (found[1].tp, found[1].fp, found[1].fn) == (1, 1, 1)
    assert found[1].iou == pytest.approx(8 / 9)
    assert found[1].qualities() == pytest.approx({"pq": 8 / 9 / 2, "sq": 8 / 9, "rq": 1 / 2})
    assert found[4].qualities() == {"pq": 1, "sq": 1, "rq": 1}
    assert found[5].qualities() == {"pq": 0, "sq": 0, "rq": 0}
    average, single = found.pq_average(CATEGORIES, isthing=None)
    assert average == pytest.approx({"pq": (4 / 9 + 1 + 0) / 3, "sq": (8 / 9 + 1) / 3, "rq": (1 / 2 + 1) / 3, "n": 3})
    assert list(single) == [1, 2, 3, 4, 5]
    assert found.pq_average(CATEGORIES, isthing=True)[0] == pytest.approx({"pq": 4 / 9, "sq": 8 / 9, "rq": 0.5, "n": 1})
    assert found.pq_average(CATEGORIES, isthing=False)[0] == pytest.approx({"pq": 0.5, "sq": 0.5, "rq": 0.5, "n": 2})


def test_statistics_are_added_and_travel_between_processes():
    total, other = _panoptic.PQStat(), _panoptic.PQStat()
    total[1].tp, total[1].iou, other[1].tp, other[1].iou, other[2].fn = 1, 0.75, 2, 1.5, 4
    total += pickle.loads(pickle.dumps(other))
    assert total[1] == _panoptic.Matches(iou=2.25, tp=3)
    assert total[2] == _panoptic.Matches(fn=4)
    average, single = _panoptic.PQStat().pq_average(CATEGORIES, isthing=True)
    assert average["n"] == 0
    assert math.isnan(average["pq"])
    assert single == {1: {"pq": 0, "sq": 0, "rq": 0}, 2: {"pq": 0, "sq": 0, "rq": 0}}


@pytest.mark.parametrize("seed", range(4))
def test_quality_against_torchmetrics(tmp_path, seed):
    from torchmetrics.detection import PanopticQuality

    random, total = np.random.default_rng(seed), _panoptic.PQStat()
    metric = PanopticQuality(things={1, 2}, stuffs={3, 4, 5}, return_sq_and_rq=True)
    for _ in range(3):
        # Category 0 is void and not predicted: torchmetrics excludes predicted void from unions, COCO does not.
        kinds, numbers = random.integers(0, 6, (6, 8)), random.integers(1, 3, (6, 8))
        kinds, numbers = (grid.repeat(5, 0).repeat(5, 1) for grid in (kinds, numbers))
        said = np.where((random.random(kinds.shape) < 0.3) | (kinds == 0), random.integers(1, 6, kinds.shape), kinds)
        pairs = [np.stack([kind, numbers * np.isin(kind, (1, 2))], -1) for kind in (kinds, said)]
        maps = [pair[..., 0] * 1000 + pair[..., 1] for pair in pairs]
        total += score(
            tmp_path,
            *((each, {int(number): int(number) // 1000 for number in np.unique(each) if number}) for each in maps),
        )
        metric.update(torch.from_numpy(pairs[1])[None], torch.from_numpy(pairs[0])[None])
    average = total.pq_average(CATEGORIES, isthing=None)[0]
    assert 0 < average["pq"] < 1
    assert [average["pq"], average["sq"], average["rq"]] == pytest.approx(metric.compute().tolist(), abs=1e-6)


def test_numbers_as_colours():
    numbers = np.array([[0, 1, 255], [256, 65_536, 256**3 - 1]], np.int32)
    colours = _panoptic.id2rgb(numbers)
    assert colours.dtype == np.uint8
    assert colours[0, 1].tolist() == [1, 0, 0]
    assert colours[1].tolist() == [[0, 1, 0], [0, 0, 1], [255, 255, 255]]
    assert (_panoptic.rgb2id(colours) == numbers).all()
    assert _panoptic.rgb2id(colours).dtype == np.int32
    every = np.arange(_panoptic.OFFSET, dtype=np.int32)[:: 257 - 2]
    assert (_panoptic.rgb2id(_panoptic.id2rgb(every)) == every).all()


def test_mmdet_finds_every_name():
    from mmdet.evaluation.functional import panoptic_utils
    from mmdet.evaluation.metrics import coco_panoptic_metric

    assert importlib.import_module("panopticapi.utils").rgb2id is coco_panoptic_metric.rgb2id
    assert coco_panoptic_metric.panopticapi is not None
    assert panoptic_utils.PQStat is _panoptic.PQStat
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("panopticapi.combine_semantic_and_instance_predictions")


def test_config_scores_its_own_truth_with_100(tiny_config):
    """Data, metric and replacement together: the prediction is the truth, then a thing has another class."""
    from mmengine.registry import DATASETS, METRICS

    cfg = tiny_config("mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic")
    data = DATASETS.build(cfg.val_dataloader.dataset)
    settings = next(metric for metric in cfg.val_evaluator if metric.type == "CocoPanopticMetric")
    qualities = []
    for change in (0, 1):
        metric = METRICS.build(settings)
        metric.dataset_meta = data.metainfo
        for index in range(len(data)):
            sample = data[index]["data_samples"]
            segments = sample.gt_sem_seg.sem_seg.clone().int()
            for number, mask in enumerate(sample.gt_instances.masks.masks):
                segments[0, torch.from_numpy(mask).bool()] += 1000 * (number + 1) + (change if number == 0 else 0)
            prediction = {"pred_panoptic_seg": {"sem_seg": segments}}
            facts = {key: getattr(sample, key) for key in ("img_id", "img_path", "ori_shape")}
            metric.process({}, [{**facts, **prediction}])
        qualities.append(metric.evaluate(len(data)))
    assert all(value == pytest.approx(100) for value in qualities[0].values())
    assert qualities[1]["coco_panoptic/PQ_st"] == pytest.approx(100)
    assert 0 < qualities[1]["coco_panoptic/PQ_th"] < 100


@pytest.mark.long
def test_installed_panopticapi_takes_precedence(tmp_path):
    (tmp_path / "panopticapi").mkdir()
    (tmp_path / "panopticapi" / "__init__.py").write_text("")
    (tmp_path / "panopticapi" / "utils.py").write_text("rgb2id = 'the real one'")
    code = (
        "import sys, terrazzo.openmmlab; sys.path.insert(0, sys.argv[1])\n"
        "from panopticapi import utils; print(utils.rgb2id)"
    )
    done = run_code(code, tmp_path)
    assert done.stdout.strip() == "the real one", done.stderr
