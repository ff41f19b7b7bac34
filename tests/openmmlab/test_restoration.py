"""The restorer, its neck, its data, its metric, and the packaged configs of restoration."""

import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import MODELS
from PIL import Image
from support.restoration import SMALL, TINY, write_pictures
from torch.nn import functional as F

from terrazzo.degradations import Bicubic
from terrazzo.degradations.bicubic import enlarged
from terrazzo.degradations.pixels import generator_of, to_pixels
from terrazzo.degradations.quality import quality
from terrazzo.errors import InputError
from terrazzo.necks import RestorerUNet
from terrazzo.openmmlab import DegradedPictures, RestorationQuality, Restorer
from terrazzo.openmmlab.config import build_runner, load_config, packaged_configs
from terrazzo.openmmlab.seeding import SeededDataset, SeededIndex

CONFIGS = [name for name, path in packaged_configs().items() if path.parent.name == "restoration"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def unet(upscale=1, **options):
    torch.manual_seed(0)
    return Restorer(SMALL, dict(type="RestorerUNet", channels=8, upscale=upscale), **options).eval()


def lively(model):
    """The model with a last layer that is not zero."""
    torch.nn.init.normal_(model.neck.last[0].weight, std=0.05, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize("size", [(40, 52), (7, 33), (1, 2)])
def test_any_size_begins_as_the_picture_itself(upscale, size):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = unet(upscale)(image)
    assert found.shape == (2, 3, upscale * size[0], upscale * size[1])
    if upscale == 1:
        assert torch.equal(found, image)
    elif min(size) > 8:  # away from the border, where the picture was reflected
        grown = F.interpolate(image, scale_factor=2, mode="bicubic")
        torch.testing.assert_close(found[..., 4:-4, 4:-4], grown[..., 4:-4, 4:-4])


def test_the_neck_has_a_default_type():
    assert isinstance(Restorer(SMALL, dict(channels=4)).neck, RestorerUNet)


def test_padding_reflects():
    """A picture is restored as the middle of the picture that reflection makes of it."""
    model = lively(unet())
    image = torch.rand(1, 3, 40, 52, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(F.pad(image, (0, 12, 0, 24), mode="reflect"))
        torch.testing.assert_close(model(image), whole[..., :40, :52])


def test_every_parameter_learns():
    """A gradient that is zero everywhere would be a part that nothing uses; layers that begin at zero would hide it."""
    model = unet(2).train()
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.05, generator=generator)
    image, target = (torch.rand(2, 3, side, side, generator=generator) for side in (64, 128))
    model(image, target, mode="loss")["loss"].backward()
    still = [
        name for name, value in model.named_parameters() if value.grad is None or not float(value.grad.abs().sum()) > 0
    ]
    assert not still


def test_losses_by_hand():
    image, target = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    difference = image - target
    l1 = unet()(image, target, mode="loss")["loss"]
    torch.testing.assert_close(l1, difference.abs().mean())
    charbonnier = unet(loss=dict(type="CharbonnierLoss", eps=0.1))(image, target, mode="loss")["loss"]
    torch.testing.assert_close(charbonnier, torch.sqrt(difference**2 + 0.01).mean())


@pytest.mark.parametrize(("upscale", "truth"), [(1, (32, 40)), (2, (16, 20))])
def test_model_and_data_of_different_scales(upscale, truth):
    message = re.escape(f"enlarges {upscale} times, and the truth is {truth} for (16, 20); ")
    with pytest.raises(InputError, match=message + "set degradation.scale or neck.upscale"):
        unet(upscale)(torch.rand(2, 3, 16, 20), torch.rand(2, 3, *truth), mode="loss")


def test_a_registered_restoration_network():
    model = Restorer(dict(name=TINY, scale=2)).eval()
    assert model.upscale == 2
    image = torch.rand(1, 3, 9, 10)
    assert torch.equal(model(image), model.backbone(image))
    model.init_weights()
    assert model._is_init


def test_predictions_of_pictures_of_several_sizes():
    model = lively(unet())
    images = [torch.rand(3, 20, 24), torch.rand(3, 33, 40)]
    samples = model(images, images, ["a.png", "b.png"], mode="predict")
    for image, name, sample in zip(images, ("a.png", "b.png"), samples):
        torch.testing.assert_close(sample["restored"], model(image[None])[0])
        assert sample["target"] is image
        assert sample["img_path"] == name
    assert set(model(images[:1], mode="predict")[0]) == {"degraded", "restored"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": {}}, "needs the name of a model"),
        ({"backbone": {"name": "resnet10t"}}, "does not restore pictures"),
        ({"backbone": {"name": TINY}, "loss": {"type": "MSELoss"}}, "L1Loss, CharbonnierLoss"),
        (
            {"backbone": {"name": TINY}, "loss": {"type": "CharbonnierLoss", "epsilon": 1}},
            "loss CharbonnierLoss has no argument 'epsilon'; it has eps",
        ),
        ({"backbone": {"name": TINY}, "loss": "L1Loss"}, "the loss is 'L1Loss'; it must be a dict"),
        ({"backbone": SMALL, "neck": {"type": "FPX"}}, "the neck 'FPX' is unknown"),
        ({"backbone": SMALL, "neck": {"chanels": 4}}, "RestorerUNet has no argument 'chanels'"),
        ({"backbone": SMALL, "neck": {"in_channels": [8]}}, "in_channels from the backbone: leave it out"),
        ({"backbone": SMALL, "neck": {"strides": [4]}}, "strides from the backbone: leave it out"),
    ],
)
def test_errors_of_the_restorer(arguments, message):
    with pytest.raises(InputError, match=message):
        Restorer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": (4, 16)}, r"double, and gets \(4, 16\)"),
        ({"strides": (3, 6)}, "powers of 2"),
        ({"strides": (4, 8), "upscale": 0}, "upscale of RestorerUNet is 0"),
    ],
)
def test_errors_of_the_neck(arguments, message):
    with pytest.raises(InputError, match=message):
        RestorerUNet((8, 8), **arguments)


def test_a_neck_on_a_plain_backbone():
    neck = RestorerUNet([24], [16], channels=4, upscale=1)
    image = torch.rand(1, 3, 32, 48)
    assert torch.equal(neck(image, [torch.rand(1, 24, 2, 3)]), image)


def test_training_crops_are_pairs(pictures):
    """With every seed, the degraded crop is the crop of the degraded picture, turned alike."""
    data = DegradedPictures(str(pictures), "images/train", dict(type="Bicubic", scale=2), crop=24, training=True)
    whole = [to_pixels(Image.open(file)) for file in data.files]
    small = [Bicubic(2)(image, generator_of("")) for image in whole]
    for seed in range(6):
        torch.manual_seed(seed)
        item = data[seed % 2]
        assert item["inputs"].shape == (3, 12, 12)
        assert item["targets"].shape == (3, 24, 24)
        assert _is_part_of(item["targets"], whole[seed % 2])
        assert _is_part_of(item["inputs"], small[seed % 2])


def test_crops_of_haze_are_parts_of_the_hazed_picture(pictures):
    """The depth recedes through the whole picture, so a crop has a part of the veil, as in validation."""
    data = DegradedPictures(str(pictures), "images/train", dict(type="Haze"), crop=16, training=True)
    degrade, hazed = data.degradation, []

    def noted(clean, generator):
        hazed.append(degrade(clean, generator))
        return hazed[-1]

    data.degradation = mock.Mock(side_effect=noted, scale=1, reach=degrade.reach)
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = data[0]["inputs"]
        assert inputs.shape == (3, 16, 16)
        assert hazed[-1].shape == (3, 40, 52)
        assert _is_part_of(inputs, hazed[-1])


@pytest.mark.parametrize("degradation", [dict(type="Haze"), dict(type="Bicubic", scale=2)])
def test_the_middle_of_a_test_picture_is_degraded_as_in_the_whole(pictures, degradation):
    arguments = (str(pictures), "images/val", degradation)
    whole, middle = DegradedPictures(*arguments)[0], DegradedPictures(*arguments, crop=16)[0]
    scale = degradation.get("scale", 1)
    for key, unit in (("inputs", scale), ("targets", 1)):
        top, left, side = (12 // unit, 18 // unit, 16 // unit)
        torch.testing.assert_close(middle[key], whole[key][:, top : top + side, left : left + side])


def _is_part_of(part, whole):
    """Whether any turned and flipped form of a square occurs in a picture, up to rounding."""
    side = part.shape[-1]
    windows = whole.unfold(1, side, 1).unfold(2, side, 1)  # 3 rows columns side side
    forms = [torch.rot90(x, turns, (-2, -1)) for x in (part, part.flip(-1)) for turns in range(4)]
    return any(bool(((windows - form[:, None, None]).abs().amax((0, 3, 4)) < 1e-5).any()) for form in forms)


def test_numbers_depend_on_the_place_in_the_run_and_not_on_the_process(pictures):
    settings = dict(
        type="DegradedPictures",
        data_root=str(pictures),
        split="images/train",
        degradation=dict(type="GaussianNoise", sigma=(0, 50)),
        crop=16,
        training=True,
    )
    place = SeededIndex(1)
    place.seed = 7
    items = []
    for draws in (0, 3):  # another process has drawn other numbers before
        data = SeededDataset(settings)
        torch.rand(draws)
        items.append(data[place]["inputs"])
    assert torch.equal(*items)
    place.seed = 8
    assert not torch.equal(items[0], SeededDataset(settings)[place]["inputs"])


def test_tests_see_the_same_noise_each_time(pictures):
    arguments = (str(pictures), "images/val", dict(type="GaussianNoise", sigma=25))
    one, same = DegradedPictures(*arguments)[0], DegradedPictures(*arguments)[0]
    assert torch.equal(one["inputs"], same["inputs"])
    middle = DegradedPictures(*arguments, crop=16)[0]
    height, width = one["targets"].shape[1:]
    top, left = (height - 16) // 2, (width - 16) // 2
    assert torch.equal(middle["targets"], one["targets"][:, top : top + 16, left : left + 16])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "images/none"}, "images/none' does not exist"),
        ({"crop": 15}, "multiple of the degradation's scale, 2"),
        ({"training": True}, "set crop"),
        ({"degradation": {"type": "Blur"}}, "'Blur' is unknown"),
    ],
)
def test_errors_of_the_data(pictures, arguments, message):
    defaults = dict(data_root=str(pictures), split="images/val", degradation=dict(type="Bicubic", scale=2))
    with pytest.raises(InputError, match=message):
        DegradedPictures(**{**defaults, **arguments})


def test_a_file_in_place_of_the_folder_and_an_empty_folder(pictures, tmp_path):
    with pytest.raises(InputError, match="is a file"):
        DegradedPictures(str(pictures), "images/val/0.png", dict(type="Haze"))
    (tmp_path / ".hidden.png").touch()
    with pytest.raises(InputError, match="holds no pictures"):
        DegradedPictures(str(tmp_path), "", dict(type="Haze"))


def test_a_picture_smaller_than_the_crop(pictures):
    data = DegradedPictures(str(pictures), "images/val", dict(type="Bicubic", scale=2), crop=64)
    with pytest.raises(InputError, match="and the crop 64"):
        data[0]


def test_the_metric_is_the_mean_beside_the_baseline():
    metric, samples = RestorationQuality(), []
    generator = torch.Generator().manual_seed(0)
    for size in (32, 40):
        truth, small = (
            torch.rand(3, size, size, generator=generator),
            torch.rand(3, size // 2, size // 2, generator=generator),
        )
        samples.append({"target": truth, "degraded": small, "restored": (truth + 0.1).clamp(0, 1)})
    metric.process({}, samples)
    found = metric.evaluate(2)
    restored = [quality(sample["restored"], sample["target"], 2) for sample in samples]
    before = [quality(enlarged(sample["degraded"], 2), sample["target"], 2) for sample in samples]
    assert len(found) == 8
    for name in restored[0]:
        assert found[f"restoration/{name}"] == pytest.approx(np.mean([one[name] for one in restored]))
        assert found[f"restoration/input_{name}"] == pytest.approx(np.mean([one[name] for one in before]))


def test_an_exact_picture_counts_as_100_db():
    """Otherwise the mean would be infinite, and no later checkpoint would be better."""
    metric = RestorationQuality()
    truth = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    worse = (truth + 0.1).clamp(0, 1)
    metric.process({}, [{"target": truth, "degraded": truth, "restored": found} for found in (truth, worse)])
    found = metric.evaluate(2)
    assert found["restoration/psnr_y"] == pytest.approx((100 + quality(worse, truth)["psnr_y"]) / 2)
    assert found["restoration/input_psnr_rgb"] == 100
    assert found["restoration/ssim_y"] < 1


@pytest.mark.parametrize(
    ("option", "value"), [({"degradation.scale": 4}, 4), ({"val_dataloader.dataset.degradation.scale": 3}, 2)]
)
def test_options_of_the_degradation_reach_the_data(pictures, option, value):
    """`degradation` is a variable of the config, which its three loaders use; a loader's own setting is its alone."""
    cfg = load_config("rgt-s-x2_super-resolution_4xb8-500k_pictures-128x128", pictures, option)
    own = option.get("val_dataloader.dataset.degradation.scale", value)
    found = [cfg[f"{split}_dataloader"].dataset.degradation.scale for split in ("train", "val", "test")]
    assert found == [value, own, value]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, pictures, tmp_path):
    """A config's model agrees with its data; it trains, validates and saves on tiny pictures with a small model."""
    cfg = load_config(name, pictures)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    for split in ("train", "val", "test"):
        dataset = cfg[f"{split}_dataloader"].dataset
        assert dataset.degradation == cfg.degradation
        assert dataset.degradation.get("scale", 1) == model.upscale
    if cfg.model.get("neck"):
        cfg.model.backbone = {"name": SMALL["name"], "out_indices": SMALL["out_indices"]}
        cfg.model.neck.channels = 4
    else:
        assert cfg.model.backbone.name == "rgt_s_x2"
        cfg.model.backbone.update(depth=(1,), embed_dim=24, num_heads=2, split_size=(4, 8))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.num_workers, loader.persistent_workers = 0, False
    cfg.train_dataloader.batch_size, cfg.train_dataloader.dataset.crop = 2, 24
    cfg.train_cfg.max_iters, cfg.train_cfg.val_interval = 1, 1
    runner = build_runner(cfg, tmp_path, seed=0, purpose="train")
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    figures = {key: runner.message_hub.get_scalar(key).current() for key in runner.message_hub.log_scalars}
    assert {"val/restoration/psnr_y", "val/restoration/input_ssim_rgb"} <= set(figures)
    assert 5 < figures["val/restoration/psnr_y"] < 60
    assert list(Path(tmp_path).glob("best_restoration_psnr_y*.pth"))


@pytest.fixture
def tuned(pictures, tmp_path):
    """A function that trains one iteration of a config from a file of weights; the trained model."""
    name = next(name for name in CONFIGS if "denoising" in name)
    options = {
        "model": dict(_delete_=True, type="Restorer", backbone=dict(name=TINY, scale=1)),
        "train_dataloader": dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(crop=16)),
        "val_dataloader": dict(num_workers=0, persistent_workers=False),
        "optim_wrapper.optimizer.lr": 0.0,
        "train_cfg.max_iters": 1,
    }

    def train(weights):
        torch.save(weights, tmp_path / "weights.pth")
        cfg = load_config(name, pictures, options)
        runner = build_runner(cfg, tmp_path, seed=0, load_from=tmp_path / "weights.pth")
        runner.train()
        return runner.model

    return train


def test_weights_of_another_model_are_refused(tuned):
    """BasicSR's files have the weights under other keys: mmengine would log so, and train from random weights."""
    state = timm.create_model(TINY, scale=1).state_dict()
    with pytest.raises(InputError, match=r"weights\.pth' has no weight of this model; .* model\.backbone\.checkpoint="):
        tuned({"params": state, "params_ema": state})


def test_a_part_of_the_weights_is_enough(tuned):
    model = tuned({"state_dict": {"module.backbone.first.bias": torch.arange(8.0), "backbone.third": torch.ones(1)}})
    assert torch.equal(model.backbone.first.bias, torch.arange(8.0))
