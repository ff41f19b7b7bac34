"""Whole models over virtual ranks equal one process: outputs and gradients; and `tiled` equals the model."""

import copy
import importlib
from collections import OrderedDict

import pytest
import timm
import torch
from support.shared_rows import assert_same, on_ranks
from torch import nn

import terrazzo
from terrazzo.errors import InputError
from terrazzo.spatial import OWN, LocalGroup, Part, active, tiled
from terrazzo.spatial._parallelize import replace
from terrazzo.spatial._tiled import joined

DINAT = dict(embed_dim=8, num_heads=(1, 2, 2, 2), depths=(2, 1, 2, 1), dilations=[[1, 4], [2], [1, 3], [1]])
VMAMBA = dict(embed_dim=8, depths=(1, 1, 1, 1), states=2)
MAMBAVISION = dict(dim=8, stem_dim=4, depths=(1, 1, 2, 2), num_heads=(2, 4), window_size=(5, 3))
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))
S2AFORMER = dict(widths=(4, 8, 12, 16), depths=(1, 1, 1, 1), heads=(1, 2, 3, 4), stem_width=4)
INFVIT = dict(depth=2, embed_dim=16, num_heads=2, img_size=(160, 80), patch_size=16)
SWIN = dict(
    embed_dim=8,
    depths=(2, 2, 1, 2),
    num_heads=(1, 2, 2, 4),
    window_size=3,
    img_size=(128, 64),
    strict_img_size=False,
    drop_path_rate=0.0,
)
VIT = dict(embed_dim=16, depth=2, num_heads=2, img_size=(144, 80), dynamic_img_size=True, dynamic_img_pad=True)
PYRAMID = dict(dim=16, depths=(1, 1, 1, 1), head_dim=8)
MODELS = {
    "swin_tiny_patch4_window7_224": SWIN,
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch14_reg4_dinov2": {**VIT, "img_size": (154, 84), "patch_size": 14},
    "s2aformer_t": S2AFORMER,
    "infvit_linear_4l_patch16_224": INFVIT,
    "infvit_pure_4l_patch16_224": {**INFVIT, "kind": "softmax"},
    "dinat_mini": DINAT,
    "dinat_s_tiny": DINAT,
    "vmamba_tiny_s1l8": VMAMBA,
    "vmamba_v0_tiny": VMAMBA,
    "mambavision_t": MAMBAVISION,
    "convnext_tiny": CONVNEXT,
    "convnextv2_tiny": CONVNEXT,
    "medmamba_t": dict(embed_dim=8, depths=(1, 1, 1, 1), states=2),
    "raftmlp_s": dict(depths=(1, 1, 1, 1), dims=(4, 8, 12, 16), img_size=(96, 64)),
    "attnet_xs": dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), expansions=(2, 2, 2, 2)),
    "dualtokenvit_tiny_mix": dict(widths=(32, 32, 64), depths=(1, 1, 1), mlp_ratios=(2, 2, 2)),
    "fmvit_tiny": dict(dims=(32, 64, 64, 64), depths=(1, 1, 1, 1), stem=(4, 4, 4)),
    "mixer_vit_tiny": dict(mixer="na", depth=2, embed_dim=16, num_heads=2, grid=(9, 5), mixer_options=dict(kernel=3)),
    "mixer_pyramid_tiny": dict(mixers=("hedgehog", "softmax", "infsa", "softmax"), **PYRAMID),
}
TOLERANCES = {name: 1e-6 for name in MODELS if name.startswith(("infvit", "vit", "mixer_vit"))}
"""timm resizes position embeddings in float32."""
TOLERANCES["fmvit_tiny"] = 1e-8  # gradients in front of a batch norm are 0, and others are large
STRIDES = {"vit_small_patch14_reg4_dinov2": 14}
SIZES = [(150, 75, 3), (97, 131, 3)]
"""Rows, columns, ranks."""


class Detector(nn.Module):
    """A backbone and mmdet's FPN with the extra level of Faster R-CNN."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        importlib.import_module("terrazzo.openmmlab")
        necks = importlib.import_module("mmdet.models.necks")
        self.backbone = backbone
        self.neck = necks.FPN(backbone.feature_info.channels(), 6, 5)

    def forward(self, x):
        return self.neck(self.backbone(x))


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("vit") and "features_only" in options:
        options["out_indices"] = (0, 1)
    model = timm.create_model(name, **MODELS[name], **options).double()
    for parameter in model.parameters():  # biases and scales that begin at 0 or 1e-6 would hide mistakes
        if parameter.dim() < 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model, outs, x):
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outs)
    loss.backward()
    return {
        **{f"output {i}": y.detach() for i, y in enumerate(outs)},
        "gradients of the image": x.grad,
        **{f"gradients of {name}": p.grad for name, p in model.named_parameters()},
    }


def compare(
    model: nn.Module,
    size: tuple[int, int, int],
    entries=None,
    shared_loss=False,
    stride=32,
    tolerance=1e-9,
    layout=None,
) -> None:
    """Compare outputs and gradients of one process and of virtual ranks, in float64."""
    height, width, ranks = size
    shared = copy.deepcopy(model)
    replace(shared, False, entries)
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = gradients(model, model(leaf := x.clone().requires_grad_()), leaf)
    leaf = x.clone().requires_grad_()

    def run(group):
        with Part(group, height, width, stride).entered() as part:
            return shared(part.scatter(leaf)), part.levels()

    found = LocalGroup(ranks).run(run)
    outs = [out for out, _ in found]
    outs = sum(outs) / ranks if shared_loss else joined(outs, found[0][1], layout)
    found = gradients(shared, outs, leaf)
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None
            continue
        scale = value.abs().max().clamp(min=0.1)  # before a batch norm, gradients of biases are 0
        assert_same(found[name] / scale, value / scale, name, tolerance)


def compare_features(name, size):
    whole = {"swin_tiny_patch4_window7_224": 4, "raftmlp_s": 32}.get(name, 1)  # they take whole patches only
    size = (size[0] // whole * whole, size[1] // whole * whole, size[2])
    model = make(name, features_only=True)
    layout = "NHWC" if name.startswith("swin") else "NCHW"
    compare(model, size, stride=STRIDES.get(name, 32), tolerance=TOLERANCES.get(name, 1e-9), layout=layout)


@pytest.mark.parametrize("name", MODELS)
def test_features(name):
    compare_features(name, SIZES[0])


MIXERS = {
    "hedgehog": {},
    "linear_infsa": {},
    "infsa": {},
    "na": dict(kernel=3, bias=True),
    "descriptor": dict(ratio=2),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_converted_vit(mixer):
    """The first layer has a mixer, the second has softmax attention."""
    model = make("vit_tiny_patch16_224", features_only=True)
    model = terrazzo.convert_attention(model, mixer, layers=[0], **MIXERS[mixer])
    for name, parameter in model.named_parameters():
        if ".mixer." in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    compare(model, (113, 48, 3), tolerance=1e-6)


def ranks_draw_alike(monkeypatch, ranks):
    """Each virtual rank has a generator of its own in the same state, as processes have."""
    generators = [torch.Generator().manual_seed(3) for _ in range(ranks)]
    draw = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *sizes: draw(*sizes, generator=generators[active().rank]))


def test_all_ranks_drop_the_same_of_tokens_in_front(monkeypatch):
    """The class token and registers after two blocks, and the class token in front of the head."""
    rates = dict(drop_rate=0.5, pos_drop_rate=0.5, proj_drop_rate=0.5)
    model = make("vit_small_patch14_reg4_dinov2", global_pool="token", num_classes=5, **rates).train()
    replace(model, False)
    ranks_draw_alike(monkeypatch, 2)

    def front(part, x):
        tokens = model.forward_features(x)[:, :5]
        return torch.cat([tokens.flatten(1), model.forward_head(tokens)], 1)

    on_ranks(front, torch.randn(2, 3, 154, 84, dtype=torch.float64), 2, 14, dim=0)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "flat"])
def test_all_ranks_drop_the_same_of_pooled_features(layout, monkeypatch):
    drop = nn.Dropout(0.5)
    replace(drop, False)
    ranks_draw_alike(monkeypatch, 2)

    def pooled(part, x):
        y = part.mean(x)
        return drop({"NCHW": y, "NHWC": y.movedim(1, 3), "flat": y.flatten(1)}[layout])

    y = on_ranks(pooled, torch.ones(1, 64, 12, 8), 2, 4, dim=0)
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_a_vit_that_is_reduced_or_has_another_mixer_is_refused():
    model = terrazzo.convert_attention(make("vit_tiny_patch16_224"), "monarch", layers=[0])
    with pytest.raises(InputError, match=r"blocks.0.attn.mixer \(\S+\.Monarch: no entry\)"):
        tiled(model, rows=64)
    model = terrazzo.reduce(make("vit_tiny_patch16_224"), "mctf")
    with pytest.raises(InputError, match=r"reducer \(\S+mctf\.Fusion: no entry\)"):
        tiled(model, rows=64)


@pytest.mark.parametrize("name", ["soft_tiny", "vir_small_patch16_224", "roma_tiny", "m3vit_tiny"])
def test_families_that_mix_all_tokens_are_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(InputError, match=rf"the model \(terrazzo.backbones.\w+.{type(model).__name__}: no entry\)"):
        tiled(model, rows=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_features_of_thin_parts(name):
    compare_features(name, SIZES[1])


def _less(needs):
    """The rows that a function says, without one row beyond each rank's own rows."""

    def less(level, *rest):
        return [
            (low + (low < start), high - (high > end))
            for (low, high), (start, end) in zip(needs(level, *rest), level.rows)
        ]

    return less


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("dinat_mini", "terrazzo_dinat.neighborhoods"),
        ("mambavision_t", "terrazzo_mambavision.windows"),
    ],
)
def test_rows_that_are_missing_are_found(name, place, monkeypatch):
    module, function = place.split(".")
    module = importlib.import_module(f"terrazzo.spatial.entries.{module}")
    needs = getattr(module, function)
    monkeypatch.setattr(module, function, _less(needs))
    with pytest.raises(AssertionError, match="differ"):
        compare(make(name, features_only=True), SIZES[0])


@pytest.mark.parametrize(
    "name", ["dinat_mini", "mambavision_t", "convnext_tiny", "vit_tiny_patch16_224", "infvit_linear_4l_patch16_224"]
)
def test_classifiers(name):
    tolerance = TOLERANCES.get(name, 1e-9)
    compare(make(name, num_classes=5), SIZES[0], shared_loss=True, tolerance=tolerance)


@pytest.mark.parametrize("size", [(128, 64, 2), (200, 75, 3)], ids=str)
def test_a_detectors_pyramid(size):
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    compare(Detector(make("dinat_mini", features_only=True)).double(), size, {Detector: OWN}, stride=64)


def test_a_stride_larger_than_the_backbones_is_asked_for():
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    model = Detector(make("dinat_mini", features_only=True)).double()
    with pytest.raises(InputError, match=r"neck has stride 2, and rank 1 begins at row 1 of 3: pass a larger `stride`"):
        tiled(model, rows=32, entries={Detector: OWN})(torch.zeros(1, 3, 96, 64, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "ATSS"])
def test_a_detector_of_convolutions(kind):
    """The maps of its head, at strides of up to 128."""
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    importlib.import_module("terrazzo.openmmlab")
    registry = importlib.import_module("mmdet.registry").MODELS
    importlib.import_module("mmdet.models")
    head = "RetinaHead" if kind == "RetinaNet" else f"{kind}Head"
    backbone = dict(type="TerrazzoBackbone", name="convnext_tiny", **CONVNEXT)
    neck = dict(type="mmdet.FPN", in_channels=list(CONVNEXT["dims"]), out_channels=32, start_level=1, num_outs=5)
    head = dict(type=head, num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1)
    torch.manual_seed(0)
    neck["add_extra_convs"] = "on_output"
    # The scope, because another test of the process may have made mmsegmentation's the default.
    model = registry.build(dict(type=kind, _scope_="mmdet", backbone=backbone, neck=neck, bbox_head=head))
    model = model.double().eval()
    x = torch.randn(1, 3, 256, 128, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    found = tiled(model, rows=128, stride=128, layout="NCHW")(x)
    assert len(found) == len(wanted) == (2 if kind == "RetinaNet" else 3)
    for maps, wanted_maps in zip(found, wanted):
        for y, want in zip(maps, wanted_maps, strict=True):
            assert_same(y, want, "maps", 1e-9)
    with pytest.raises(InputError, match="no mode 'predict'"):
        tiled(model, rows=128, stride=128)(x, mode="predict")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("upernet_dinat-mini_8xb2-160k_ade20k-512x512", (390, 300)),
        ("fpn_dinat-mini_floors", (384, 288)),
        ("segformer-head_dinat-mini_1xb4-10k_camvid-480x360", (200, 288)),
    ],
)
def test_a_segmentor(name, size):
    """UPerNet's head pools the whole map to several sizes; FPN and its head resize maps, the head by a factor;
    SegFormer's head resizes maps to the largest."""
    pytest.importorskip("mmseg", reason="needs the extra 'openmmlab'")
    config = importlib.import_module("terrazzo.openmmlab.config")
    MODELS = importlib.import_module("mmseg.registry").MODELS
    model = config.load_config(name).model
    model.backbone.update(embed_dim=8, num_heads=(1, 2, 2, 2), depths=(1, 1, 1, 1), dilations=[[2], [1], [1], [1]])
    model.backbone.update(drop_path_rate=0.0, pretrained=False)
    model.pretrained = None
    for head in (model.decode_head, model.get("auxiliary_head")):
        if head:
            head.update(channels=8, num_classes=3, norm_cfg=dict(type="BN"))
    if "neck" in model:
        model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
        model.decode_head.in_channels = [8] * 4
    else:
        model.decode_head.in_channels = [8, 16, 32, 64]
        if "auxiliary_head" in model:
            model.auxiliary_head.in_channels = 32
    torch.manual_seed(0)
    model = MODELS.build(model).double().eval()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    assert_same(tiled(model, rows=128)(x), wanted, "logits", 1e-9)
    with pytest.raises(InputError, match="no mode 'predict'"):
        tiled(model, rows=128)(x, mode="predict")


@pytest.mark.parametrize(
    "name",
    [
        *("dinat_mini", "vmamba_v0_tiny", "mambavision_t", "medmamba_t", "raftmlp_s", "dualtokenvit_tiny_mix"),
        *("fmvit_tiny", "mixer_vit_tiny"),
    ],
)
def test_tiled_equals_the_model_and_leaves_it_whole(name):
    model = make(name, features_only=True).eval()
    x = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    over_parts = tiled(model, rows=32, layout="NCHW")  # a map of 8 channels and 8 columns has two readings
    for found, want in zip(over_parts(x), wanted):
        assert not found.requires_grad
        assert_same(found, want, "maps", TOLERANCES.get(name, 1e-9))
    for found, want in zip(model(x), wanted):  # the model alone
        assert_same(found, want, "maps")


def test_a_tiled_classifier():
    x = torch.randn(1, 3, 128, 64, dtype=torch.float64)
    torch.testing.assert_close(tiled(make("dinat_mini"), rows=64)(x), make("dinat_mini")(x))


def test_deformable_attention_is_refused_by_name():
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    importlib.import_module("terrazzo.openmmlab")
    layer = importlib.import_module("mmcv.ops").MultiScaleDeformableAttention(embed_dims=16, num_heads=2)
    with pytest.raises(InputError, match=r"neck \(\S+\.MultiScaleDeformableAttention: no entry\)"):
        replace(nn.Sequential(OrderedDict(neck=layer)), False)


def test_what_is_refused():
    with pytest.raises(InputError, match="rows must be at least the model's stride, 32, got 31"):
        tiled(make("dinat_mini"), rows=31)
    with pytest.raises(InputError, match=r"VisionTransformer: pools all tokens \('avg'\)"):
        tiled(timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg"), rows=64)
