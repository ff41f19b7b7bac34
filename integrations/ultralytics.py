"""A backbone for ultralytics' model files (YOLO), and a model file for any backbone with a pyramid."""

import timm
import torch

from terrazzo.backbones._names import check_name
from terrazzo.errors import InputError
from terrazzo.integrations._frameworks import framework
from terrazzo.integrations.maps import Maps

_STRIDES = (8, 16, 32)  # of P3, P4 and P5, the maps that YOLO's head reads

_MODEL_FILE = """\
# YOLOv8's neck and head on {name}. Load it after terrazzo.integrations.ultralytics.register().
nc: {classes}
depth_multiple: 0.33
width_multiple: 0.5

backbone: # from, repeats, module, arguments
  - [-1, 1, TerrazzoBackbone, [{name}, {pretrained}]] # 0: its maps of strides 8, 16 and 32
  - [0, 1, Index, [{channels[0]}, 0]] # 1: P3
  - [0, 1, Index, [{channels[1]}, 1]] # 2: P4
  - [0, 1, Index, [{channels[2]}, 2]] # 3: P5
  - [-1, 1, SPPF, [1024, 5]] # 4

head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 2], 1, Concat, [1]]
  - [-1, 3, C2f, [512]] # 7
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 1], 1, Concat, [1]]
  - [-1, 3, C2f, [256]] # 10: P3
  - [-1, 1, Conv, [256, 3, 2]]
  - [[-1, 7], 1, Concat, [1]]
  - [-1, 3, C2f, [512]] # 13: P4
  - [-1, 1, Conv, [512, 3, 2]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 3, C2f, [1024]] # 16: P5
  - [[10, 13, 16], 1, Detect, [nc]]
"""


class TerrazzoBackbone(Maps):
    """Maps of strides 8, 16 and 32, in a list; the layers `Index` of a model file choose one each.

    Raises:
        InputError: There is no such model, or it has no such maps.
    """

    def __init__(self, name: str, pretrained: bool = False):
        super().__init__(name, pretrained, _indices(name))


def register() -> None:
    """Let ultralytics' model files name `TerrazzoBackbone`.

    Call it once in each process that reads a model file. A trained `.pt` file needs no call: ultralytics pickles whole
    models, and Python imports the class.

    Raises:
        BackendError: ultralytics is not installed.
    """
    framework("ultralytics.nn.tasks", "ultralytics").TerrazzoBackbone = TerrazzoBackbone


def model_file(name: str, classes: int = 80, pretrained: bool = False) -> str:
    """The text of a model file: YOLOv8's neck and head on a backbone.

        Path("yolo_dinat-mini.yaml").write_text(model_file("dinat_mini", classes=3))

    Args:
        name: A model of `timm.list_models()` with maps of strides 8, 16 and 32.
        classes: Number of classes.
        pretrained: Load the weights that timm knows.

    Raises:
        InputError: There is no such model, or it has no such maps.
    """
    with torch.device("meta"):
        channels = TerrazzoBackbone(name).channels
    return _MODEL_FILE.format(name=name, classes=classes, pretrained=pretrained, channels=channels)


def _indices(name: str) -> list[int]:
    """The stages of a model whose maps have the strides of YOLO's head."""
    check_name(name)
    with torch.device("meta"):
        every = timm.create_model(name, features_only=True).feature_info
    strides = [stage["reduction"] for stage in every.info]
    if not set(_STRIDES) <= set(strides):
        raise InputError(
            f"YOLO's head reads maps of strides {', '.join(map(str, _STRIDES))}, and {name} has {strides}: "
            "choose a model with a pyramid, or the name that terrazzo.register_pyramid gives a plain model"
        )
    return [strides.index(stride) for stride in _STRIDES]
