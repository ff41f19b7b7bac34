"""Several tasks on one backbone: one config trains a segmentor and a depth estimator, and the call chooses the task."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from support.golden_packs import ROOT, Pack
from support.tiny_data import segmentation_batch

from terrazzo.errors import InputError
from terrazzo.openmmlab import DepthBeside
from terrazzo.openmmlab.config import build_runner, load_config

NAME = "m3vit-tiny_1xb8-100e_cityscapes-256x128"
SMALL = {"model.backbone.embed_dim": 48, "model.backbone.depth": 2, "model.backbone.expert_hidden": 24}
SMALL |= {"model.backbone.out_indices": (1,), "model.tasks.segmentation.decode_head.in_channels": 48}
SMALL |= {"model.tasks.depth.decode_head.in_channels": 48}
SMALL |= {f"model.tasks.{task}.decode_head.width": 16 for task in ("segmentation", "depth")}


def build(change=lambda settings: None):
    cfg = load_config(NAME, options=SMALL)
    change(cfg.model)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(cfg.model)


@pytest.fixture(scope="module")
def data():
    """A preprocessed batch of two images of 70 x 100 with classes and depths, some of them unknown."""
    from mmengine.structures import PixelData

    size = (70, 100)
    batch = segmentation_batch(classes=19, channels=3, size=size)
    for i, sample in enumerate(batch["data_samples"]):
        depth = torch.rand(1, *size, generator=torch.Generator().manual_seed(i)) * 9 + 1
        depth[:, :5] = 0
        sample.gt_depth_map = PixelData(data=depth)
    return batch


def prepared(model, data, training=False):
    model.train(training)
    return model.data_preprocessor(copy.deepcopy(data), training)


class TestModel:
    def test_one_place_of_every_parameter(self):
        model = build()
        assert not [name for name in model.state_dict() if "shared" in name or ".backbone." in name[9:]]
        assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "tasks"}
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(task.backbone.shared[0] is other.backbone for task in other.tasks.values())
            assert other.backbone is not model.backbone

    def test_the_call_chooses(self, data):
        model = build()
        batch = prepared(model, data)
        with torch.no_grad():
            both = model(**batch, mode="tensor")
            assert both["segmentation"].shape[1] == 19
            assert both["depth"].shape[1] == 1
            for task, wanted in both.items():
                maps = model.backbone(batch["inputs"], task=task)
                assert torch.equal(model(**batch, task=task), wanted)
                assert torch.equal(model.tasks[task].decode_head(maps), wanted)
            assert not torch.equal(*(model.backbone(batch["inputs"], task=task)[0] for task in both))
        with pytest.raises(InputError, match="task must be one of segmentation, depth, got 'edges'"):
            model(**batch, task="edges")

    def test_predictions(self, data):
        """A sample has the results of both tasks, at the size of the picture; or of one task; also without samples."""
        model = build()
        batch = prepared(model, data)
        with torch.no_grad():
            found = model(**copy.deepcopy(batch), mode="predict")
            alone = model(**copy.deepcopy(batch), mode="predict", task="depth")
            bare = model(batch["inputs"], mode="predict")
        for sample, other in zip(found, alone, strict=True):
            assert sample.pred_sem_seg.data.shape == sample.pred_depth_map.data.shape == (1, 70, 100)
            assert torch.equal(sample.pred_depth_map.data, other.pred_depth_map.data)
            assert "pred_sem_seg" not in other
        assert all({"pred_sem_seg", "pred_depth_map"} <= set(sample.keys()) for sample in bare)

    def test_losses(self, data):
        """The sum of both tasks' losses, each by hand, and the loss of each task's routers."""
        model = build()
        batch = prepared(model, data, training=True)
        for task in model.tasks.values():
            task.eval()  # so that batch norms give the same outputs again
        for task in model.tasks.values():
            task.backbone.train()
        losses = model(**batch, mode="loss")
        assert all(task.backbone.balance is None for task in model.tasks.values()), "the pass would stay in memory"
        names = {"decode.loss_ce", "loss_balance"}, {"decode.loss_depth", "loss_balance"}
        assert {*losses} == {f"{task}.{name}" for task, own in zip(("segmentation", "depth"), names) for name in own}
        samples = batch["data_samples"]
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in samples])
        depths = torch.stack([sample.gt_depth_map.data for sample in samples])
        assert labels.shape[1:] == depths.shape[2:] == (128, 256)  # padded by 255
        with torch.no_grad():
            out = model(**batch)
        wanted = torch.nn.functional.cross_entropy(out["segmentation"], labels, ignore_index=255, reduction="sum")
        torch.testing.assert_close(losses["segmentation.decode.loss_ce"].detach(), wanted / labels.numel())
        known = (depths > 0) & (depths != 255)
        assert known.sum() == 2 * 65 * 100
        torch.testing.assert_close(
            losses["depth.decode.loss_depth"].detach(), (out["depth"] - depths)[known].abs().mean()
        )
        for task in ("segmentation", "depth"):
            routing = model.backbone.model.routing(task, balance=True)
            model.backbone(batch["inputs"], routing=routing)
            torch.testing.assert_close(losses[f"{task}.loss_balance"], 0.01 * routing.balance)
        sum(losses.values()).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]

    def test_official_decoder(self):
        """The decoders have the authors' names."""
        pack = Pack(ROOT / "m3vit" / "up_head_c64_1.npz")
        with DefaultScope.overwrite_default_scope("mmseg"):
            head = MODELS.build(dict(type="M3ViTDepthHead", in_channels=[64]))
        head.decoder.load_state_dict(pack.weights(), strict=False)
        assert set(pack.weights()) <= set(head.decoder.state_dict())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda model: model.backbone.update(tasks=("depth", "edges")), "and its backbone has depth, edges; name"),
            (lambda model: model.tasks.pop("depth"), "has the tasks segmentation, and its backbone has segmentation,"),
            (
                lambda model: setattr(model, "backbone", dict(type="TerrazzoBackbone", name="dinat_mini")),
                "needs a TerrazzoBackbone of an M3ViT, for example m3vit_tiny, got",
            ),
        ],
    )
    def test_errors(self, change, message):
        with pytest.raises(InputError, match=message):
            build(change)


@pytest.fixture
def root(tiny_data, tmp_path):
    """Tiny Cityscapes with made-up disparities, 0 in the first rows."""
    random, root = np.random.default_rng(0), tmp_path / "cityscapes"
    root.mkdir()
    source = tiny_data("cityscapes")
    for folder in ("leftImg8bit", "gtFine"):
        (root / folder).symlink_to(source / folder)
    for path in source.glob("leftImg8bit/*/*/*.png"):
        values = random.integers(256, 60 * 256, Image.open(path).size[::-1], dtype=np.uint16)
        values[:8] = 0
        file = (
            root
            / "disparity"
            / path.relative_to(source / "leftImg8bit").with_name(path.name.replace("leftImg8bit", "disparity"))
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(file)
    return root


def test_trains_validates_and_predicts(root, tmp_path):
    """One config trains both tasks and has the metrics of both."""
    small = {f"{loader}.num_workers": 0 for loader in ("train_dataloader", "val_dataloader", "test_dataloader")}
    small |= {f"{loader}.persistent_workers": False for loader in ("train_dataloader", "val_dataloader")}
    small |= {"train_dataloader.batch_size": 2, "train_cfg.max_epochs": 2, "train_cfg.val_interval": 2}
    runner = build_runner(load_config(NAME, root, {**SMALL, **small}), tmp_path / "run", seed=0)
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/depth.decode.loss_depth").current())
    assert not [key for key, value in runner.model.named_parameters() if torch.equal(value, before[key])]
    assert {"val/mIoU", "val/rmse"} <= set(runner.message_hub.log_scalars)
    sample = next(iter(runner.val_dataloader))["data_samples"][0]
    assert sample.gt_depth_map.data.shape == sample.gt_sem_seg.data.shape == (1, 64, 128)
    assert not sample.gt_depth_map.data[:, :8].any()
    assert 1 <= sample.gt_depth_map.data[:, 8:].min() < sample.gt_depth_map.data.max() <= 60


def test_depth_beside_a_picture():
    find = DepthBeside([["leftImg8bit", "disparity"]])
    found = find(dict(img_path="data/leftImg8bit/val/ulm/a_leftImg8bit.png", seg_fields=[]))
    assert found["depth_map_path"] == "data/disparity/val/ulm/a_disparity.png"
    with pytest.raises(InputError, match="has no 'leftImg8bit'"):
        find(dict(img_path="a.png"))


def test_full_size_config():
    cfg = load_config(NAME, "/elsewhere")
    assert "data/" not in cfg.pretty_text.replace("/elsewhere/", "")
    with torch.device("meta"), DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model)
    decoders = 2 * 2_217_095 + (19 - 7) * 257 - 6 * 257  # a decoder of 7 classes has 2,217,095
    assert sum(p.numel() for p in model.parameters()) == 17_983_680 + decoders
