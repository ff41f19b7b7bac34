"""segmentation_models_pytorch: any pyramid as `tu-NAME`."""

import pytest
import torch
from support.ecosystem import reloads, step
from support.seeded import image

import terrazzo

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs the extra 'ecosystem'")
pytestmark = pytest.mark.slow

ARCHITECTURES = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer", "DPT")
FAMILIES = ("attnet_xxs", "dinat_mini", "vmamba_tiny_s1l8")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*((architecture, "s2aformer_mini") for architecture in ARCHITECTURES), *(("Unet", name) for name in FAMILIES)],
)
def test_steps_and_reloads(architecture, name, tmp_path):
    def make():
        return smp.create_model(architecture, encoder_name=f"tu-{name}", encoder_weights=None, classes=3)

    torch.manual_seed(0)
    model, x = make(), image((64, 96), batch=2)
    logits = model(x)
    assert logits.shape == (2, 3, 64, 96)
    target = torch.arange(3).repeat(2, 64, 32)
    unused = "model.head." if architecture == "DPT" else ""  # its encoder is the whole classifier
    step(smp.losses.DiceLoss("multiclass")(logits, target), model.encoder, unused)
    reloads(model, make, lambda model: model(x), tmp_path / "model.pth")


@pytest.mark.parametrize("architecture", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_dilated_architectures(architecture, tmp_path):
    """These three ask the encoder for `output_stride`."""

    def make():
        return smp.create_model(architecture, encoder_name="tu-dinat_mini", encoder_weights=None, classes=3)

    torch.manual_seed(0)
    model, x = make(), image((128, 160), batch=2)  # PAN pools the last map three times
    step(model(x).square().mean(), model.encoder)
    reloads(model, make, lambda model: model(x), tmp_path / "model.pth")


def test_a_plain_model_under_the_name_of_its_pyramid(tmp_path):
    def make():
        return smp.Unet(f"tu-{terrazzo.register_pyramid('roma_tiny', channels=32)}", encoder_weights=None, classes=3)

    torch.manual_seed(0)
    model, x = make(), image((64, 96), batch=2)
    step(model(x).square().mean(), model.encoder)
    reloads(model, make, lambda model: model(x), tmp_path / "model.pth")
