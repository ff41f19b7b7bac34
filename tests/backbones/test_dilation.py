"""Layers of a stage that keeps the size of its map (`output_stride`): every second position is the layer's result."""

import pytest
import timm
import torch
from support.seeded import build, image
from torch import nn

import terrazzo
from terrazzo.backbones import dinat, dualtokenvit, fmvit, s2aformer, soft
from terrazzo.backbones._dilation import dilate
from terrazzo.backbones._layers import ConvDownsampler, PatchMerging

HALVING = {
    "conv": lambda: ConvDownsampler(8, bias=True),
    "merging": lambda: PatchMerging(8),
    "light merging": lambda: dualtokenvit.LightPatchMerging(8, 16),
    "patches": lambda: s2aformer.PatchEmbed(8, 16),
    "units": lambda: soft.ConvUnits((8, 16, 2)),
}


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
@pytest.mark.parametrize("kind", HALVING)
def test_downsamplers(kind, size):
    torch.manual_seed(0)
    layer, x = HALVING[kind]().eval(), torch.randn(2, *size, 8)
    wanted = layer(x)
    dilate(layer, 1, 2)
    found = layer(x)
    assert found.shape[1:3] == size
    torch.testing.assert_close(found[:, ::2, ::2], wanted)
    later = HALVING[kind]().eval()
    dilate(later, 2, 4)
    assert later(x).shape[1:3] == size


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_averages(size):
    layer, x = fmvit.PatchEmbed(8, 16, 2).eval(), torch.randn(2, 8, *size)
    wanted = layer(x)
    dilate(layer, 1, 2)
    torch.testing.assert_close(layer(x)[..., ::2, ::2], wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dinat.NeighborhoodAttention(8, 2, 3, 1),
        lambda: s2aformer.StripSelfAttention(8, 2, 2),
        lambda: s2aformer.LocalInteraction(8),
        lambda: soft.HeadConv(1, 3),
    ],
    ids=["neighborhood", "strip", "local", "head conv"],
)
def test_layers_see_the_same_part_of_the_image(make):
    torch.manual_seed(0)
    layer = make().eval()
    x = torch.randn(1, 16, 12, 32 if isinstance(layer, soft.HeadConv) else 8)
    wanted = layer(x[:, ::2, ::2].contiguous())
    dilate(layer, 1, 2)
    torch.testing.assert_close(layer(x)[:, ::2, ::2], wanted)


@pytest.mark.long
@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny"])
def test_a_model_of_local_layers_is_exact(name):
    options = dict(depths=(1, 1, 1, 1), dilations=[[2], [1], [2], [1]])
    plain = build(name, features_only=True, **options)
    x = image((96, 64))
    for stride in (8, 16):
        model = timm.create_model(name, features_only=True, output_stride=stride, **options).eval()
        model.load_state_dict(plain.state_dict(), strict=True)
        for found, wanted in zip(model(x), plain(x)):
            step = found.shape[2] // wanted.shape[2]
            torch.testing.assert_close(found[..., ::step, ::step], wanted)


def test_the_form_for_inference_is_dilated():
    model = build("fmvit_tiny", features_only=True, output_stride=16)
    wanted = model(image((64, 96)))
    torch.testing.assert_close(terrazzo.reparameterize(model)(image((64, 96))), wanted, rtol=1e-3, atol=1e-3)


def test_landmarks_cover_the_same_part_of_the_image():
    layer = soft.SoftmaxFreeAttention(32, 2, 3, False, "global")
    dilate(layer, 1, 2)
    assert layer(torch.randn(1, 8, 6, 32)).shape == (1, 8, 6, 32)
    assert layer.Qlandmark_op(torch.zeros(1, 32, 8, 8)).shape[2:] == (2, 2)
    assert not any(isinstance(part, nn.Conv2d) and part.stride == (2, 2) for part in layer.modules())
