"""transformers: TimmBackbone inside its detectors and segmentors, and TimmWrapper as a classifier.

`save_pretrained` and `from_pretrained` are the reload. A step trains what `from_pretrained` must find again.
"""

import pytest
import timm
import torch
from support.ecosystem import equal, leaves, reloads, step
from support.seeded import image
from timm.models._features import FeatureGetterNet

import terrazzo

transformers = pytest.importorskip("transformers", reason="needs the extra 'ecosystem'")
pytestmark = pytest.mark.slow

BOXES = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}]


def backbone(name: str, indices=(0, 1, 2, 3)):
    return transformers.TimmBackboneConfig(backbone=name, out_indices=list(indices))


def channels(name: str) -> list[int]:
    with torch.device("meta"):
        return timm.create_model(name, features_only=True).feature_info.channels()


def detr(name: str):
    config = transformers.DetrConfig(
        backbone_config=backbone(name),
        num_labels=3,
        num_queries=5,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    return transformers.DetrForObjectDetection(config), dict(labels=BOXES)


def rt_detr(name: str):
    config = transformers.RTDetrConfig(
        backbone_config=backbone(name, (1, 2, 3)),
        encoder_in_channels=channels(name)[1:],
        freeze_backbone_batch_norms=False,
        num_labels=3,
        num_queries=10,
        num_denoising=2,
        d_model=32,
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_layers=1,
    )
    return transformers.RTDetrForObjectDetection(config), dict(labels=BOXES)


def mask2former(name: str):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone(name),
        num_labels=3,
        num_queries=5,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        train_num_points=64,
    )
    masks = torch.zeros(1, 64, 64)
    masks[0, 10:40, 20:60] = 1
    return (
        transformers.Mask2FormerForUniversalSegmentation(config),
        dict(mask_labels=[masks], class_labels=[torch.tensor([1])]),
    )


def upernet(name: str):
    config = transformers.UperNetConfig(
        backbone_config=backbone(name),
        num_labels=3,
        hidden_size=32,
        auxiliary_in_channels=channels(name)[2],
        auxiliary_channels=16,
    )
    return transformers.UperNetForSemanticSegmentation(config), dict(labels=torch.arange(2).repeat(1, 64, 32))


def dpt(name: str):
    """DPT in its hybrid form: a ViT reads the map of stride 16, and the fusion reads the two maps before as well."""
    widths = channels(name)[:3]
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config=backbone(name, (0, 1, 2)),
        backbone_featmap_shape=[1, widths[2], 4, 6],
        backbone_out_indices=[0, 1, 0, 1],  # of the ViT: the last two
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        neck_hidden_sizes=[*widths[:2], 32, 32],
        fusion_hidden_size=16,
        num_labels=3,
    )
    return transformers.DPTForSemanticSegmentation(config), dict(labels=torch.arange(2).repeat(1, 64, 32))


MODELS = [detr, rt_detr, mask2former, upernet, dpt]


def runs(model, x, tmp_path):
    """The copy from the files has all weights, to the bit, and gives the same output up to rounding.

    transformers maps the file into memory, so weights lie at other addresses, and PyTorch adds in another order.
    """
    model.eval().save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    found = again.state_dict()
    assert not [name for name, weight in model.state_dict().items() if not torch.equal(found[name], weight)]
    with torch.no_grad():
        torch.testing.assert_close(leaves(again.eval()(x)), leaves(model(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dinat_mini", "s2aformer_mini", "attnet_xxs"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_steps_and_reloads(make, name, tmp_path):
    torch.manual_seed(0)
    model, targets = make(name)
    x = image((64, 64), batch=2)
    targets = {key: torch.cat([value] * 2) if torch.is_tensor(value) else value * 2 for key, value in targets.items()}
    (body,) = (part for part in model.modules() if isinstance(part, FeatureGetterNet))
    step(model.train()(pixel_values=x, **targets).loss, body)
    runs(model, x[:1], tmp_path)


def test_rt_detr_on_a_plain_model(tmp_path):
    torch.manual_seed(0)
    model, targets = rt_detr(terrazzo.register_pyramid("roma_tiny", channels=32))
    x = image((64, 64))
    step(model.train()(pixel_values=x, **targets).loss, model.model.backbone)
    runs(model, x, tmp_path)


@pytest.mark.parametrize("name", ["dinat_mini", "s2aformer_mini", "vmamba_tiny_s1l8", "roma_tiny"])
def test_backbone_gives_the_models_maps(name, tmp_path):
    def make():
        return transformers.TimmBackbone(backbone(name, (1, 2)))

    model, x = make(), image((48, 64))
    maps = model(x).feature_maps
    step(sum(y.square().mean() for y in maps), model)
    maps = model.eval()(x).feature_maps
    assert [y.shape[1] for y in maps] == list(model.channels)
    assert equal(list(maps), list(model._backbone(x)))
    reloads(model, make, lambda model: model(x), tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["dinat_mini", "attnet_xxs", "roma_tiny"])
def test_wrapper_classifies(name, tmp_path):
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=3)
    model, x = transformers.TimmWrapperForImageClassification(config), image((48, 64), batch=2)
    step(model.train()(x, labels=torch.tensor([0, 2])).loss, model.timm_model)
    runs(model, x, tmp_path)
