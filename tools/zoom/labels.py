"""The label maps of a config's data: of a segmentor, or foreground and background of instances."""

import copy
from collections.abc import Iterator

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS

from terrazzo.errors import InputError
from terrazzo.openmmlab.building import building
from terrazzo.openmmlab.config import datasets


def label_maps(cfg: Config, split: str, every: int = 1) -> tuple[Iterator[np.ndarray], tuple[str, ...]]:
    """The label maps of every N-th picture, in the order of the data set.

    Args:
        cfg: What `terrazzo.openmmlab.config.load_config` gave.
        split: "train", "val" or "test".
        every: N.

    Returns:
        Maps (H, W), in which values from the number of classes on are ignored, and the classes' names; for instances
        these are "background" and "foreground".

    Raises:
        InputError: The config has no data of this split, or no annotation.
    """
    found = next(datasets(cfg, split), None)
    if found is None:
        raise InputError(f"config {cfg.filename} has no {split}_dataloader, so it names no data for it")
    settings = copy.deepcopy(found)
    loading = next((s for s in settings.get("pipeline") or () if str(s["type"]).endswith("LoadAnnotations")), None)
    if loading is None:
        raise InputError(f"the {split} pipeline of {cfg.filename} has no LoadAnnotations, so it says nothing of labels")
    settings.pipeline = []
    with building(cfg, f"{split}_dataloader.dataset"):
        dataset, step = DATASETS.build(settings), TRANSFORMS.build(loading)
    infos = (dataset.get_data_info(index) for index in range(0, len(dataset), every))
    if loading.get("with_mask"):
        return (_foreground(step, info) for info in infos), ("background", "foreground")
    names = tuple(dataset.metainfo["classes"])
    return (_classes(step, info) for info in infos), names


def _classes(step, info: dict) -> np.ndarray:
    labels = step(info).get("gt_seg_map")
    if labels is None:
        raise InputError("the data has boxes without masks: the oracle needs label maps, or masks (with_mask=True)")
    return np.where(labels < 0, 255, labels).astype(np.int64)


def _foreground(step, info: dict) -> np.ndarray:
    """1 where any instance is."""
    size = (info["height"], info["width"])
    masks = step({**info, "ori_shape": size, "img_shape": size})["gt_masks"].to_ndarray()
    return masks.any(0).astype(np.int64) if len(masks) else np.zeros(size, np.int64)
