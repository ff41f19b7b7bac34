"""Tiny data sets in the layouts of the real data sets, and the packaged configs reduced to them."""

import pytest
import timm
import torch
from support import tiny_data as data

from terrazzo.tools.data.paths.folders import Asked, write_paths


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A function from the name of a data set to the root of its tiny version; each version is written once."""
    from terrazzo.openmmlab.config import load_config, packaged_configs

    roots = {}

    def root_of(name):
        if name in roots:
            return roots[name]
        root = roots[name] = tmp_path_factory.mktemp("data") / name
        if name in data.FULL_SIZE:
            data.FULL_SIZE[name](root)
        elif name in ("camvid", "floors"):
            suffix, classes = (".jpg", 11) if name == "camvid" else (".png", 6)
            data.write_segmentation(root, suffix, classes, (128, 128))
        elif name.startswith("paths-"):
            root.mkdir()
            write_paths(root, Asked(64, True, {"train": 2, "val": 2}, contour=6))
        elif name in ("bccd", "nuclei"):
            names = ("RBC", "WBC", "Platelets") if name == "bccd" else ("nucleus",)
            data.write_detection(root, names, (96, 64), masks=name == "nuclei")
        else:
            config = next(stem for stem in packaged_configs() if stem.endswith(name))
            classes = load_config(config).train_dataloader.dataset.metainfo.classes
            data.write_folders(root, classes, (64, 64))
        return root

    return root_of


def _shrink(value):
    """Replace image sizes in a pipeline by small sizes, in place."""
    if isinstance(value, dict):
        kind = str(value.get("type")).split(".")[-1]
        if "scale" in value and kind in ("Resize", "RandomResize"):
            value["scale"] = (96, 64)
        if kind in ("CachedMosaic", "CachedMixUp"):
            value["img_scale"] = (64, 64)
        if kind == "Pad" and "size" in value:
            value["size"] = (96, 96) if value["size"][0] == value["size"][1] else value["size"]
        if value.get("type") == "RandomChoiceResize":
            value["scales"] = [48, 64] if isinstance(value["scales"][0], int) else [(72, 48), (96, 64)]
        if value.get("ratio_range", (1,))[0] < 0.5:
            value["ratio_range"] = (0.5, 2.0)
        if "crop_size" in value:
            value["crop_size"] = (64, 64)
        if isinstance(value.get("input_size"), int):
            value["input_size"] = 64
        for item in value.values():
            _shrink(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _shrink(item)


# Arguments that make the models of a family small. In other families, a large model is swapped for a small DiNAT.
SMALLER = {
    "dinat": dict(depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 2, 4, 8), dilations=[[2], [1], [1], [1]]),
    "m3vit": dict(embed_dim=48, num_heads=3, expert_hidden=24),
    "mambavision": dict(depths=(1, 1, 2, 2), dim=32, stem_dim=16, window_size=(8, 4)),
    "mixer": dict(depths=(1, 1, 1, 1), dim=32),
    "vmamba": dict(depths=(1, 1, 1, 1), embed_dim=16),
    "mctf": dict(embed_dim=96, num_heads=3),
    "raftmlp": dict(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128)),
    "vir": dict(embed_dim=48),
    "asvit": dict(embed_dim=96, num_heads=3),
    "infvit": dict(embed_dim=96, num_heads=3),
}


def _shrink_model(model):
    """Make a large backbone small, or swap it and adapt later channels, and reduce the number of regions."""
    backbone = model.backbone
    backbone.pretrained = False
    if backbone.name.startswith(("roma", "vit_")):  # a plain backbone stays plain, with two blocks
        backbone.update(depth=2, out_indices=(1,))
    elif sum(p.numel() for p in timm.create_model(backbone.name, device="meta").parameters()) > 9e6:
        family, indices = backbone.name.split("_")[0], backbone.get("out_indices", (0, 1, 2, 3))
        if family not in SMALLER or family == "dinat":
            for key in ("kernel_size", "img_size", "patch_size"):
                backbone.pop(key, None)
            family, backbone.name = "dinat", "dinat_mini"
        backbone.update(SMALLER[family])
        pyramid = timm.create_model(
            backbone.name, features_only=True, out_indices=indices, device="meta", **SMALLER[family]
        )
        channels = pyramid.feature_info.channels()
        behind = next((model[key] for key in ("neck", "panoptic_head", "decode_head") if model.get(key)), {})
        behind["in_channels"] = channels
        if model.type == "TopdownPoseEstimator":
            model.head.in_channels = channels[-1]
        if "auxiliary_head" in model:
            model.auxiliary_head.in_channels = channels[2]
    if "window" in backbone:  # small pictures have several levels, too
        backbone.window = 3
    if "num_queries" in model:  # DINO selects this many positions from the maps, and tiny maps have few
        model.num_queries = 50
        model.encoder.num_layers = model.decoder.num_layers = 2
    for head in filter(None, map(model.get, ("panoptic_head", "decode_head", "auxiliary_head"))):
        if "pixel_decoder" in head:  # three layers of its decoder see the three levels
            head.num_queries = 20
            head.pixel_decoder.encoder.num_layers, head.transformer_decoder.num_layers = 1, 3
            for settings in (head.get("train_cfg"), model.get("train_cfg")):
                if "num_points" in (settings or {}):
                    settings.num_points = 256
        elif head.type in ("UPerHead", "FCNHead"):
            head.channels = 32
        elif head.type == "M3ViTHead":
            head.width = 32
    if "roi_head" in model:
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
        model.test_cfg.rpn.max_per_img = 50
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.fc_out_channels = 64
        heads = model.roi_head.get("mask_head") or []
        for head in heads if isinstance(heads, list) else [heads]:
            head.num_convs, head.conv_out_channels = 1, 32
    preprocessor = model.get("data_preprocessor") or {}
    for part in (preprocessor, *(preprocessor.get("batch_augments") or ())):
        if "size" in part:
            part["size"] = (64, 64)


def _write_teacher(model, file):
    """Write random weights for a model that distils from its initial weights."""
    options = {key: value for key, value in model.backbone.items() if key != "name"}
    torch.save(timm.create_model(model.backbone.name, **options).state_dict(), file)
    model.backbone.checkpoint = str(file)


@pytest.fixture
def tiny_config(tiny_data, tmp_path):
    """A function from the name of a packaged config to that config, on tiny data, for one training step."""
    from terrazzo.openmmlab.config import load_config

    def config_of(name, **options):
        cfg = load_config(name)
        small = {f"{loader}.num_workers": 0 for loader in ("train_dataloader", "val_dataloader", "test_dataloader")}
        small["train_dataloader.batch_size"] = 10 if cfg.model.type == "Classifier" else 2
        limit = "max_iters" if cfg.train_cfg.get("type") == "IterBasedTrainLoop" else "max_epochs"
        small |= {f"train_cfg.{limit}": 1, "train_cfg.val_interval": 1, "default_hooks.checkpoint.interval": 1}
        cfg = load_config(name, tiny_data(cfg.data_root.rstrip("/").split("/")[-1]), {**small, **options})
        cfg.train_cfg.pop("dynamic_intervals", None)
        for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
            _shrink(cfg[loader])
        _shrink_model(cfg.model)
        if (cfg.model.get("recipe") or {}).get("type") == "TokenBudget":
            _write_teacher(cfg.model, tmp_path / "teacher.pt")
        return cfg

    return config_of
