"""Every packaged config builds at full size, and takes a training step, validates and predicts on tiny data.

For the step, a large backbone is made small or swapped for `dinat_mini`, and pictures are small; head, losses,
pipeline, metric and optimizer come from the config. For each task, the first config of every head and data set runs,
and for each family the first config with a dense head; other configs are marked slow.
"""

import math
import re

import pytest
import torch
from mmengine.registry import DATASETS, MODELS
from torch import nn

from terrazzo.necks import PlainPyramid
from terrazzo.openmmlab.config import build_runner, load_config, packaged_configs

# These configs have tests of their own.
OTHERS = ("conversion", "multitask", "pose", "pretraining", "restoration", "rotated", "video", "zoom")
CONFIGS = {name: path for name, path in packaged_configs().items() if path.parent.name not in OTHERS}
PANOPTIC = "mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic"


def cases():
    """Every config; a config is slow if earlier configs of its task have its head, data set and family.

    Configs with small backbones come first, then configs with heads that train quickly.
    """
    seen = set()
    large = {name: not re.search(r"-(mini|xxs)_", name) for name in CONFIGS}
    heavy = {name: name.startswith(("cascade", "mask2former")) for name in CONFIGS}
    for name in sorted(CONFIGS, key=lambda name: (large[name], heavy[name], name)):
        task, parts = CONFIGS[name].parent.name, name.split("_")
        head, backbone = ("", parts[0]) if task == "classification" else parts[:2]
        # A family that trains with one dense head also trains with other dense heads.
        dense = task in ("detection", "segmentation")
        kinds = {(task, kind) for kind in (head, re.sub(r"-\d+(x\d+)?$", "", parts[-1]))}
        kinds.add(("dense" if dense else task, backbone.split("-")[0]))
        marks = [pytest.mark.slow] if kinds <= seen else []
        seen |= kinds
        yield pytest.param(name, marks=marks)


@pytest.mark.long
@pytest.mark.parametrize("name", cases())
def test_trains_validates_and_predicts(name, tiny_config, tmp_path):
    cfg = tiny_config(name, **{"default_hooks.checkpoint.save_optimizer": False})  # it takes up to a gigabyte
    runner = build_runner(cfg, tmp_path, seed=0)
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    after = dict(runner.model.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    backbone = [key for key in before if key.startswith("backbone.")]
    assert any(not torch.equal(before[key], after[key]) for key in backbone)
    # Parallel processes would wait forever for a missing gradient.
    reached = runner.optim_wrapper.optimizer.state.keys()
    assert [key for key, value in after.items() if value not in reached] == [
        key for key, value in after.items() if not value.requires_grad
    ]
    assert any(key.startswith("val/") for key in runner.message_hub.log_scalars)
    assert name != PANOPTIC or "val/coco_panoptic/PQ" in runner.message_hub.log_scalars
    checkpoints = list(tmp_path.glob("*.pth"))
    assert checkpoints
    for checkpoint in checkpoints:  # each has hundreds of megabytes
        checkpoint.unlink()
    runner.model.eval()
    batch = next(iter(runner.val_dataloader))
    assert len(runner.model.val_step(batch)) == len(batch["inputs"])


def with_bases(path):
    """The text of a config and of the base files of terrazzo's own (mmdet's and mmseg's need their packages)."""
    text = path.read_text()
    bases = [path.parent / base for base in re.findall(r'"(\.\.?/[^"]*\.py)"', text)]
    return text + "".join(with_bases(base) for base in bases)


@pytest.mark.parametrize("name", list(packaged_configs()))
def test_file_names_and_docstrings(name):
    text = packaged_configs()[name].read_text()
    assert text.startswith('"""')
    assert 'custom_imports = dict(imports=["terrazzo.openmmlab"])' in with_bases(packaged_configs()[name])
    assert len(text.splitlines()) <= 40


# The parameters of whole models in millions, from the tables of COCO and ADE20K in arXiv 2204.07143 (NAT), 2209.15001
# (DiNAT) and 2401.10166 (VMamba).
PUBLISHED = {
    "mask-rcnn": {
        **{"nat-mini": 40, "nat-tiny": 48, "dinat-mini": 40, "dinat-tiny": 48, "dinat-s-tiny": 48},
        **{"vmamba-tiny-s1l8": 50, "vmamba-small-s2l15": 70, "vmamba-base-s2l15": 108},
        "softpp-tiny": 33,
    },
    "retinanet": {"softpp-tiny": 23},
    "cascade-mask-rcnn": {
        **{"nat-tiny": 85, "nat-small": 108, "nat-base": 147},
        **{"dinat-tiny": 85, "dinat-small": 108, "dinat-base": 147, "dinat-large": 258},
        **{"dinat-s-small": 107, "dinat-s-base": 145, "dinat-s-large": 253},
    },
    "upernet": {
        **{"nat-mini": 50, "nat-tiny": 58, "nat-small": 82, "nat-base": 123},
        **{"dinat-mini": 50, "dinat-tiny": 58, "dinat-small": 82, "dinat-base": 123, "dinat-large": 238},
        **{"dinat-s-tiny": 60, "dinat-s-small": 81, "dinat-s-base": 121, "dinat-s-large": 234},
        **{"vmamba-tiny-s1l8": 62, "vmamba-small-s2l15": 82, "vmamba-base-s2l15": 122},
        "softpp-small": 54,
    },
    "mask2former": {"dinat-large": 220},
}


def class_counts(model):
    """The numbers of classes of the heads in a model's config; they should be equal."""
    found = set()
    for key, value in model.items():
        if key == "num_classes":
            found.add(value)
        if key == "num_things_classes":
            found.add(value + model["num_stuff_classes"])
        if key == "class_weight" and value:
            found.add(len(value) - 1)  # the last entry is for "no object"
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, dict):
                found |= class_counts(part)
    return found


def class_count(cfg):
    """The number of classes of a config's data set, from the config or from the data set's class."""
    dataset = cfg.train_dataloader.dataset
    if dataset.type == "ImageFolderDataset" and not dataset.get("metainfo"):  # ImageNet-1k, which no config names
        return 1000
    with DATASETS.switch_scope_and_registry(None) as registry:
        return len((dataset.get("metainfo") or registry.get(dataset.type).METAINFO)["classes"])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_full_size_model(name):
    """The model of a config builds, on the meta device; its parts agree with each other and the data."""
    cfg = load_config(name, "/elsewhere")
    assert cfg.data_root == "/elsewhere"
    assert "data/" not in cfg.pretty_text.replace("/elsewhere/", "")
    cfg.model.backbone.pretrained = False
    cfg.model.pop("recipe", None)  # a recipe may distil from weights, and the test has no weights
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert class_counts(cfg.model) == {class_count(cfg)}
    if cfg.model.type == "Classifier":
        return
    behind = next(cfg.model[key] for key in ("neck", "panoptic_head", "decode_head") if cfg.model.get(key))
    assert list(behind.in_channels) == model.backbone.out_channels
    if getattr(model, "with_auxiliary_head", False):
        pyramid = model.backbone.out_channels * (4 if isinstance(getattr(model, "neck", None), PlainPyramid) else 1)
        assert model.auxiliary_head.in_channels == pyramid[model.auxiliary_head.in_index]
    head, backbone, *_, data = name.split("_")
    published = PUBLISHED.get(head, {}).get(backbone)
    if published and data.startswith(("coco", "ade20k")):
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(published, abs=0.6)


@pytest.mark.long
def test_moving_mean_of_the_weights(tiny_config, tmp_path):
    """ImageNet configs validate and save averaged weights; training weights are saved, too, and training resumes."""
    name = "dinat-mini_8xb128-300e_imagenet"
    build_runner(tiny_config(name, **{"train_cfg.max_epochs": 2}), tmp_path, seed=0).train()
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=True)
    training = {key.removeprefix("module."): value for key, value in saved["ema_state_dict"].items()}
    del training["steps"]
    assert training.keys() == saved["state_dict"].keys()
    assert any(not torch.equal(value, saved["state_dict"][key]) for key, value in training.items())

    runner = build_runner(tiny_config(name, **{"train_cfg.max_epochs": 2}), tmp_path, resume=True)
    runner.train()  # training is finished, so it only loads
    assert all(torch.equal(value, training[key]) for key, value in runner.model.state_dict().items())


@pytest.mark.long
@pytest.mark.parametrize("name", [PANOPTIC, "mask2former_dinat-large_8xb2-160k_ade20k-640x640"])
def test_mask2former_rates(name):
    """The backbone has a tenth of the rate; matrices decay, and norms, biases, rpb and embeddings do not."""
    from mmengine.optim import build_optim_wrapper

    cfg = load_config(name)
    cfg.model.backbone.pretrained = False
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    settings = {id(value): (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]}
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for p in m.parameters()}
    for key, value in model.named_parameters():
        free = id(value) in norms or key.endswith(
            ("rpb", "query_embed.weight", "query_feat.weight", "level_embed.weight")
        )
        rate = 1e-5 if key.startswith("backbone.") else 1e-4
        assert settings[id(value)] == pytest.approx((rate, 0.0 if free else 0.05)), key
