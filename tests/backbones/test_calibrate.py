"""`terrazzo.calibrate` on converted models."""

import pytest
import torch
from support.seeded import build, image

import terrazzo
from terrazzo.errors import InputError

STATE = {"anchor": "theta", "sale": "tau", "tca": "profile"}
OPTIONS = {
    "anchor": (dict(edge=4, theta=-3.0), dict(recall=0.9)),
    "sale": (dict(edge=4, tau=0.5), dict(error=1e-2)),
    "tca": (dict(mu=0.0), dict(error=1e-3)),
}


def converted(mixer="sale", **options):
    vit = build("vit_small_patch16_224", img_size=256, dynamic_img_size=True, embed_dim=48, num_heads=3, depth=3).eval()
    return terrazzo.convert_attention(vit, mixer, dense_up_to=64, **options)


@pytest.mark.long
@pytest.mark.parametrize("mixer", STATE)
@torch.no_grad()
def test_thresholds_are_saved_with_the_model(mixer):
    options, calibration = OPTIONS[mixer]
    model, x = converted(mixer, **options), image((256, 256), batch=2)
    before = model.state_dict()[f"blocks.1.attn.mixer.{STATE[mixer]}"].clone()
    assert terrazzo.calibrate(model, x, **calibration) is model
    assert not torch.equal(model.state_dict()[f"blocks.1.attn.mixer.{STATE[mixer]}"], before)
    other = converted(mixer, **options)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.long
@torch.no_grad()
def test_batches_modes_and_repetition():
    """A generator of batches is taken, modes and hooks stay, and a second call does not build on the first."""
    options, calibration = OPTIONS["sale"]
    model = converted(**options).train()
    model.blocks[0].eval()
    seen = []

    def batches():
        for i in range(2):
            yield image((256, 256))
            seen.append(i)

    terrazzo.calibrate(model, batches(), **calibration)
    assert seen == [0, 1]
    assert model.training
    assert model.blocks[1].training
    assert not model.blocks[0].norm1.training
    first = {key: x.clone() for key, x in model.state_dict().items()}
    terrazzo.calibrate(model, image((256, 256)), **calibration)
    assert all(torch.equal(x, first[key]) for key, x in model.state_dict().items())
    assert not any(block.attn.mixer._forward_pre_hooks for block in model.blocks)


def test_errors():
    model, x = converted(tau=0.5, edge=4), image((256, 256))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for images, options, message in (
        ([], {}, "images holds no batch"),
        (image((128, 128)), {}, "no layer was calibrated, .*the map has no more than 64 patches.*larger images"),
        (x, dict(recall=0.9), "'sale' cannot be calibrated with recall"),
        (x, dict(error=-1), "error must be above 0, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            terrazzo.calibrate(model, images, **options)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(InputError, match="no layer of the model can be calibrated: convert layers"):
        terrazzo.calibrate(terrazzo.convert_attention(model, "hedgehog"), x)
