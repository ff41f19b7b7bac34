"""`terrazzo export` of whole detectors: the file finds what mmdet finds, with standard operators only."""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image
from support.lively import enliven

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import load_config
from terrazzo.tools import mm
from terrazzo.tools.export import targets as export_targets
from terrazzo.tools.export.detectors import RawDetector

SIZE = (96, 128)

SMALL_REGIONS = {
    "model.neck.out_channels": 32,
    "model.rpn_head.in_channels": 32,
    "model.rpn_head.feat_channels": 32,
    "model.roi_head.bbox_roi_extractor.out_channels": 32,
    "model.roi_head.mask_roi_extractor.out_channels": 32,
    "model.test_cfg.rpn.max_per_img": 60,
    "model.test_cfg.rcnn.max_per_img": 40,
}
SMALL_BOX_HEAD = {"num_classes": 5, "in_channels": 32, "fc_out_channels": 32}
SMALL_MASK_HEAD = {"num_classes": 5, "in_channels": 32, "conv_out_channels": 16, "num_convs": 1}

FIVE = {
    f"{split}_dataloader.dataset.metainfo": {"classes": ["a", "b", "c", "d", "e"]} for split in ("train", "val", "test")
}

SMALL_QUERIES = {
    "model.panoptic_head.num_queries": 20,
    "model.panoptic_head.pixel_decoder.encoder.num_layers": 1,
    "model.panoptic_head.transformer_decoder.num_layers": 3,
    "model.test_cfg.max_per_image": 15,
}
CASES = {
    "fcos_dinat-mini_fpn_1x_coco": {
        "model.neck.out_channels": 32,
        "model.bbox_head.in_channels": 32,
        "model.bbox_head.feat_channels": 64,  # in 32 groups, of maps that may be of one pixel
        "model.bbox_head.num_classes": 5,
        **FIVE,
    },
    "cascade-mask-rcnn_dinat-small_fpn_3x_coco": {
        **SMALL_REGIONS,
        **{f"model.roi_head.bbox_head.{n}.{key}": value for n in range(3) for key, value in SMALL_BOX_HEAD.items()},
        **{f"model.roi_head.mask_head.{key}": value for key, value in SMALL_MASK_HEAD.items()},
        **FIVE,
    },
    "mask2former_dinat-large_16xb1-lsj-100e_coco": SMALL_QUERIES,
    "mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic": {
        **SMALL_QUERIES,
        "model.test_cfg.object_mask_thr": 0.1,
        "model.test_cfg.iou_thr": 0.1,
    },
    "dino-4scale_dinat-tiny_8xb2-12e_coco": {
        "model.num_queries": 30,
        "model.test_cfg.max_per_img": 40,
        "model.encoder.num_layers": 1,
        "model.decoder.num_layers": 2,
    },
    "retinanet_dinat-mini_fpn_1x_coco": {
        "model.neck.out_channels": 32,
        "model.bbox_head.in_channels": 32,
        "model.bbox_head.feat_channels": 32,
        "model.bbox_head.stacked_convs": 1,
        "model.bbox_head.num_classes": 5,
        **FIVE,
    },
    "mask-rcnn_dinat-mini_fpn_1x_coco": {
        **SMALL_REGIONS,
        **{f"model.roi_head.bbox_head.{key}": value for key, value in SMALL_BOX_HEAD.items()},
        **{f"model.roi_head.mask_head.{key}": value for key, value in SMALL_MASK_HEAD.items()},
        **FIVE,
    },
}
"""The options that make each config small."""

SLOW = (
    "fcos_dinat-mini_fpn_1x_coco",
    "cascade-mask-rcnn_dinat-small_fpn_3x_coco",
    "mask2former_dinat-large_16xb1-lsj-100e_coco",
    "mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic",
    "mask-rcnn_dinat-mini_fpn_1x_coco",
)
"""Configs that share most of their code with the others; the tests of `terrazzo infer` export a Mask R-CNN."""


@pytest.fixture
def tiny(tmp_path):
    """A function from the name of a config to a small double of it on disk, and weights that find many things."""

    def write(name, **options):
        cfg = load_config(name, None, CASES[name])
        levels = cfg.model.backbone.get("out_indices", (0, 1, 2, 3))
        indices = [level + 1 for level in levels]
        cfg.model.backbone = dict(type="TerrazzoBackbone", name="resnet10t", out_indices=indices)
        behind = next(cfg.model[key] for key in ("neck", "panoptic_head") if cfg.model.get(key))
        behind["in_channels"] = [(64, 128, 256, 512)[level] for level in levels]
        torch.manual_seed(0)
        detector = MODELS.build(copy.deepcopy(cfg.model)).eval()
        enliven(detector, name, SIZE)
        cfg.merge_from_dict(options)
        config, checkpoint = tmp_path / f"{name}.py", tmp_path / "weights.pth"
        cfg.dump(config)
        torch.save({"state_dict": detector.state_dict()}, checkpoint)
        return config, checkpoint

    return write


def found(path, image):
    """What the file finds in pixels (1, 3, H, W), by output."""
    session = onnxruntime.InferenceSession(path)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, {"image": image.numpy()})))


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_finds_what_mmdet_finds(run, tiny, picture, tmp_path, name):
    config, checkpoint = tiny(name)
    path = tmp_path / "detector.onnx"
    # RetinaNet pads sizes that its strides do not divide
    size, image = ((67, 91), picture) if "retinanet" in name else (SIZE, None)
    own = ("--image", image) if image else ()
    result = run("export", config, checkpoint, "--size", *size, *own, "--out", path)
    assert result.exit_code == 0, result.output
    assert "nothing" not in result.output
    assert ("floor.png" in result.stdout) == bool(image)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    facts = {entry.key: entry.value for entry in model.metadata_props}
    names = ["boxes", "scores", "labels"] + (["masks"] if "mask" in name else [])
    names += ["segments"] if "panoptic" in name else []
    assert facts["outputs"].split(", ") == names
    counted = 133 if "panoptic" in name else 5 if FIVE.keys() <= CASES[name].keys() else 80
    assert len(json.loads(facts["classes"])) == counted
    # The command compared values; this checks shapes, types and order.
    outputs = found(path, export_targets.photo(Image.open(image), size, 1) if image else export_targets.floor(size, 1))
    count = len(outputs["boxes"])
    assert count > 5
    assert outputs["boxes"].shape == (count, 4)
    assert outputs["boxes"].min() >= 0
    assert (outputs["boxes"].max(axis=0) <= [size[1], size[0]] * 2).all()
    assert (np.diff(outputs["scores"]) <= 0).all()
    assert outputs["labels"].dtype == np.int64
    if "masks" in outputs:
        assert outputs["masks"].shape == (count, *size)
        assert outputs["masks"].dtype == np.uint8
        assert set(np.unique(outputs["masks"])) == {0, 1}


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["retinanet_dinat-mini_fpn_1x_coco", pytest.param("mask-rcnn_dinat-mini_fpn_1x_coco", marks=pytest.mark.slow)],
)
def test_nothing_found(run, tiny, tmp_path, name):
    """A high threshold: the file runs and finds nothing, and the command says that nothing was compared."""
    key = "model.test_cfg.rcnn.score_thr" if "rcnn" in name else "model.test_cfg.score_thr"
    config, checkpoint = tiny(name, **{key: 0.999999})
    path = tmp_path / "detector.onnx"
    result = run("export", config, checkpoint, "--size", *SIZE, "--out", path)
    assert result.exit_code == 0, result.output
    assert "warning: the model found nothing" in result.stderr
    assert "no boxes found" in result.stdout
    outputs = found(path, export_targets.noise(SIZE, 1))
    assert outputs["boxes"].shape == (0, 4)
    assert outputs["scores"].shape == outputs["labels"].shape == (0,)
    assert "masks" not in outputs or outputs["masks"].shape == (0, *SIZE)


@pytest.mark.long
def test_another_result_fails(run, tiny, tmp_path, monkeypatch):
    config, checkpoint = tiny("retinanet_dinat-mini_fpn_1x_coco")
    forward = RawDetector.forward

    def changed(self, image):
        boxes, *rest = forward(self, image)
        return boxes + 3, *rest

    monkeypatch.setattr(RawDetector, "forward", changed)
    (tmp_path / "out").mkdir()
    result = run("export", config, checkpoint, "--size", *SIZE, "--out", tmp_path / "out" / "a.onnx")
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.stdout
    assert "disagree" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.onnx.failed"]


def test_refusals(refused, tiny, tmp_path):
    config, checkpoint = tiny("retinanet_dinat-mini_fpn_1x_coco")
    arguments = ("export", config, checkpoint, "--out", tmp_path / "out" / "a.onnx")
    assert "--size H W" in refused(*arguments)
    sized = (*arguments, "--size", *SIZE)
    assert "one image per run" in refused(*sized, "--batch", 2)
    assert "one image per run" in refused(*sized, "--dynamic", "batch")
    assert "does not exist" in refused(*sized, "--image", tmp_path / "none.png")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retinanet_dinat-mini_fpn_1x_coco", {"model.test_cfg.nms.type": "soft_nms"}, "soft_nms"),
        ("retinanet_dinat-mini_fpn_1x_coco", {"model.bbox_head.bbox_coder.type": "YOLOBBoxCoder"}, "YOLOBBoxCoder"),
        ("mask-rcnn_dinat-mini_fpn_1x_coco", {"model.roi_head.type": "PISARoIHead"}, "PISARoIHead"),
        ("mask-rcnn_dinat-mini_fpn_1x_coco", {"model.roi_head.mask_head.type": "CoarseMaskHead"}, "CoarseMaskHead"),
        ("mask-rcnn_dinat-mini_fpn_1x_coco", {"model.test_cfg.rcnn.mask_thr_binary": -1}, "mask_thr_binary"),
    ],
)
def test_what_is_not_covered_is_named(name, options, message):
    cfg = load_config(name, None, {**CASES[name], **options, "model.backbone.pretrained": False})
    if "YOLO" in message:
        cfg.model.bbox_head.bbox_coder = dict(type="YOLOBBoxCoder")
    with mm.quiet(), pytest.raises(InputError, match=message):
        RawDetector(MODELS.build(cfg.model), SIZE)
