"""lightly: self-supervised training of a backbone whose classifier is removed."""

import pytest
import timm
import torch
from support.ecosystem import reloads, step
from support.seeded import image
from torch import nn

import terrazzo  # noqa: F401

pytest.importorskip("lightly", reason="needs the extra 'ecosystem'")
pytestmark = pytest.mark.slow


class SimClr(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone = timm.create_model(name, num_classes=0)
        width = self.backbone.head_hidden_size  # num_features are the channels of the last map
        self.head = SimCLRProjectionHead(width, width, 16)

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize("name", ["s2aformer_mini", "dinat_mini", "roma_tiny"])
def test_simclr_steps_and_reloads(name, tmp_path):
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    torch.manual_seed(0)
    transform = SimCLRTransform(input_size=64)
    views = [transform(Image.new("RGB", (80, 80), colour)) for colour in ("red", "green", "blue")]
    first, second = (torch.stack([pair[i] for pair in views]) for i in (0, 1))
    model = SimClr(name)
    step(NTXentLoss()(model(first), model(second)), model.backbone)
    reloads(model, lambda: SimClr(name), lambda model: model(image((64, 64))), tmp_path / "model.pth")
