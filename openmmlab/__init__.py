"""The bridge to mmengine, mmdetection and mmsegmentation.

A config needs one line to use it:

    custom_imports = dict(imports=["terrazzo.openmmlab"])

Importing it registers terrazzo's backbones with timm and its wrappers with mmengine's root registries (mmdet and mmseg
look there too), provides mmcv's compiled operators if no compiled mmcv is installed, and panopticapi if it is not
installed, repairs OpenMMLab's other packages while they are imported, makes mmengine's checkpoints plain data, lets
mmcv read pictures as terrazzo does, and registers timm's LAMB among the optimizers, because PyTorch has no LAMB. It
imports neither mmdet nor mmseg.
"""

import terrazzo.openmmlab._transformers  # isort: skip  before mmengine's optimizers are imported
from mmengine.registry import OPTIMIZERS
from timm.optim import Lamb

import terrazzo  # noqa: F401  registers the backbones with timm
from terrazzo.openmmlab import (
    _ext,
    _finder,
    _mmengine,
    _panoptic,
    _pycocotools,
    addresses,
    checkpoint,
    clips,
    pictures,
    repairs,
    saving,
)

_mmengine.repair()
_pycocotools.repair()
_mmengine.find_packaged_bases()
_finder.install({**_ext.MODULES, **_panoptic.MODULES})
repairs.install(repairs.REPAIRS)
checkpoint.install()
addresses.install()
saving.install()
pictures.install()
clips.register()
OPTIMIZERS.register_module(module=Lamb, force=True)

from terrazzo.necks import FinerLevel, PlainPyramid, RestorerUNet  # noqa: E402
from terrazzo.openmmlab.backbone import TerrazzoBackbone  # noqa: E402
from terrazzo.openmmlab.classifier import Classifier  # noqa: E402
from terrazzo.openmmlab.conversion import AttentionConversion, Fidelity, StudentHook  # noqa: E402
from terrazzo.openmmlab.datasets import ImageFolderDataset, Pictures, RotatedImages  # noqa: E402
from terrazzo.openmmlab.degraded_pictures import DegradedPictures  # noqa: E402
from terrazzo.openmmlab.finite import FiniteLossHook  # noqa: E402
from terrazzo.openmmlab.layer_decay import LayerDecayOptimWrapperConstructor  # noqa: E402
from terrazzo.openmmlab.metrics import ClassificationAccuracy  # noqa: E402
from terrazzo.openmmlab.monitoring import MonitoredMetricsHook  # noqa: E402
from terrazzo.openmmlab.multi_task import DepthBeside, M3ViTDepthHead, M3ViTHead, MultiTask, TaskBackbone  # noqa: E402
from terrazzo.openmmlab.path_accuracy import PathAccuracy  # noqa: E402
from terrazzo.openmmlab.precision import Bfloat16OptimWrapper  # noqa: E402
from terrazzo.openmmlab.restoration_quality import RestorationQuality  # noqa: E402
from terrazzo.openmmlab.restorer import Restorer  # noqa: E402
from terrazzo.openmmlab.roma_pretraining import RoMAPretraining  # noqa: E402
from terrazzo.openmmlab.seeding import SeededDataset, SeededSampler, SeedingHook  # noqa: E402
from terrazzo.openmmlab.throughput import ThroughputHook  # noqa: E402
from terrazzo.openmmlab.token_budget import TokenBudget  # noqa: E402
from terrazzo.openmmlab.token_consistency import TokenConsistency  # noqa: E402
from terrazzo.openmmlab.wandb_log import WandbLog  # noqa: E402
from terrazzo.openmmlab.workers import WorkersHook  # noqa: E402
from terrazzo.openmmlab.zoom_heads import ZoomHeads, ZoomHeadsHook, ZoomQuality  # noqa: E402

__all__ = [
    "AttentionConversion",
    "Bfloat16OptimWrapper",
    "ClassificationAccuracy",
    "Classifier",
    "DegradedPictures",
    "DepthBeside",
    "Fidelity",
    "FinerLevel",
    "FiniteLossHook",
    "ImageFolderDataset",
    "LayerDecayOptimWrapperConstructor",
    "M3ViTDepthHead",
    "M3ViTHead",
    "MonitoredMetricsHook",
    "MultiTask",
    "PathAccuracy",
    "Pictures",
    "PlainPyramid",
    "RestorationQuality",
    "Restorer",
    "RestorerUNet",
    "RoMAPretraining",
    "RotatedImages",
    "SeededDataset",
    "SeededSampler",
    "SeedingHook",
    "StudentHook",
    "TaskBackbone",
    "TerrazzoBackbone",
    "ThroughputHook",
    "TokenBudget",
    "TokenConsistency",
    "WandbLog",
    "WorkersHook",
    "ZoomHeads",
    "ZoomHeadsHook",
    "ZoomQuality",
]
