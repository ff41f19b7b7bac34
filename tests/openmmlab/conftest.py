"""Tiny data sets in the layouts of the real ones, and the packaged configs cut down to them."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

SPLITS = {"train": 2, "val": 2, "test": 2}


def _picture(random, size):
    return Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def _write_segmentation(root, suffix, classes, size):
    random = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            labels = random.integers(0, classes, (size[1] // 8, size[0] // 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            labels[:4] = 255
            _picture(random, size).save(root / "images" / split / f"{index}{suffix}")
            Image.fromarray(labels).save(root / "labels" / split / f"{index}.png")
    return root


def _write_coco(root, names, size, masks):
    random = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in SPLITS.items():
        (root / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            images.append({"id": index, "file_name": f"{index}.jpg", "width": size[0], "height": size[1]})
            _picture(random, size).save(root / "images" / split / f"{index}.jpg")
            for number in range(3):
                x, y, w, h = 8 + 20 * number, 10, 16, 20
                mask = np.zeros((size[1], size[0]), np.uint8, order="F")
                mask[y : y + h, x : x + w] = 1
                run_lengths = coco_mask.encode(mask)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": 1 + number % len(names),
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": {"size": run_lengths["size"], "counts": run_lengths["counts"].decode()}
                        if masks
                        else [],
                    }
                )
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _write_folders(root, names, size):
    random = np.random.default_rng(0)
    for split in SPLITS:
        for name in names:
            (root / split / name).mkdir(parents=True)
            _picture(random, size).save(root / split / name / f"{name}_0.jpg")
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A function from the name of a data set to the root of its tiny double; each is written once."""
    from terrazzo.openmmlab.config import load_config, packaged_configs

    roots = {}

    def root_of(name):
        if name in roots:
            return roots[name]
        root = tmp_path_factory.mktemp("data") / name
        if name in ("camvid", "floors"):
            suffix, classes = (".jpg", 11) if name == "camvid" else (".png", 6)
            roots[name] = _write_segmentation(root, suffix, classes, (128, 128))
        elif name in ("bccd", "nuclei"):
            names = ("RBC", "WBC", "Platelets") if name == "bccd" else ("nucleus",)
            roots[name] = _write_coco(root, names, (96, 64), masks=name == "nuclei")
        else:
            config = next(stem for stem in packaged_configs() if stem.endswith(name))
            classes = load_config(config).train_dataloader.dataset.metainfo.classes
            roots[name] = _write_folders(root, classes, (64, 64))
        return roots[name]

    return root_of


def _shrink(value):
    """Replaces the image sizes in a pipeline by small ones, in place."""
    if isinstance(value, dict):
        if "scale" in value and value.get("type") in ("Resize", "RandomResize"):
            value["scale"] = (96, 64)
        if "crop_size" in value:
            value["crop_size"] = (64, 64)
        for item in value.values():
            _shrink(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _shrink(item)


@pytest.fixture
def tiny_config(tiny_data):
    """A function from the name of a packaged config to that config, on tiny data, for one training step."""
    from terrazzo.openmmlab.config import load_config

    def config_of(name, **options):
        cfg = load_config(name)
        small = {f"{loader}.num_workers": 0 for loader in ("train_dataloader", "val_dataloader", "test_dataloader")}
        small["train_dataloader.batch_size"] = 10 if cfg.model.type == "Classifier" else 2
        if cfg.train_cfg.type == "IterBasedTrainLoop":
            small |= {"train_cfg.max_iters": 1, "train_cfg.val_interval": 1, "default_hooks.checkpoint.interval": 1}
        else:
            small |= {"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1, "default_hooks.checkpoint.interval": 1}
        cfg = load_config(name, tiny_data(cfg.data_root.split("/")[-1]), {**small, **options})
        for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
            _shrink(cfg[loader])
        if "size" in (cfg.model.get("data_preprocessor") or {}):
            cfg.model.data_preprocessor.size = (64, 64)
        return cfg

    return config_of
