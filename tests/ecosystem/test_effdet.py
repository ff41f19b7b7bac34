"""effdet: EfficientDet's BiFPN and heads on a backbone."""

import pytest
import torch
from support.ecosystem import reloads, step
from support.seeded import image

import terrazzo

effdet = pytest.importorskip("effdet", reason="needs the extra 'ecosystem'")
pytestmark = pytest.mark.slow


def make(name: str):
    if name == "roma_tiny_pyramid":
        terrazzo.register_pyramid("roma_tiny")
    config = effdet.get_efficientdet_config("efficientdet_d0")
    config.update(
        dict(
            backbone_name=name,
            backbone_args=dict(drop_path_rate=0.1),
            backbone_indices=(1, 2, 3),  # strides 8, 16 and 32
            image_size=[128, 128],
            num_classes=3,
        )
    )
    return effdet.DetBenchTrain(effdet.EfficientDet(config, pretrained_backbone=False), create_labeler=True)


@pytest.mark.parametrize("name", ["s2aformer_mini", "dinat_mini", "vmamba_tiny_s1l8", "roma_tiny_pyramid"])
def test_steps_and_reloads(name, tmp_path):
    torch.manual_seed(0)
    bench, x = make(name), image((128, 128), batch=2)
    target = {
        "bbox": [torch.tensor([[10.0, 10, 60, 70]]), torch.tensor([[40.0, 30, 100, 90]])],
        "cls": [torch.tensor([1.0]), torch.tensor([3.0])],
    }
    step(bench(x, target)["loss"], bench.model.backbone)
    reloads(bench.model, lambda: make(name).model, lambda model: model(x), tmp_path / "model.pth")
    (found,) = effdet.DetBenchPredict(bench.model.eval())(x[:1])
    assert found.shape[1] == 6  # box, score, class
