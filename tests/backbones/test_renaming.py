"""Names of parameters: transformers keeps them, and files with the names of earlier versions load."""

import re

import pytest
import timm
import torch
from torch import nn

from terrazzo.backbones import FAMILIES
from terrazzo.backbones._names import registered_models
from terrazzo.backbones._weights import _Uninitialised
from terrazzo.tools.mm import load_exactly

RENAMED = (
    ("backbone.conv_encoder", "backbone"),
    ("out_proj", "o_proj"),
    (r"self_attn\.out_proj", "self_attn.o_proj"),
    (r"encoder_attn\.out_proj", "encoder_attn.o_proj"),
    (r"layers\.(\d+)\.fc(\d)", r"layers.\1.mlp.fc\2"),
    (r"layers\.(\d+)\.fc1", r"layers.\1.mlp.layers.0"),
    (r"layers\.(\d+)\.fc2", r"layers.\1.mlp.layers.1"),
    (r"encoder\.encoder\.(\d+)\.layers", r"encoder.aifi.\1.layers"),
    (r"decoder\.layers\.(\d+)\.(?:sa|ca)_\w+_proj", r"decoder.layers.\1.self_attn.proj"),
    (r"bbox_attention\.([qk])_linear", r"bbox_attention.\1_proj"),
    (r"mask_head\.\w+", "mask_head.conv"),
    (r"decoder_\w+_(?:head|pointer)\.", "decoder.head."),
    (r"s2r_fusion\.a", "decoder.s2r_fusion.closure_weight"),
    (r"LayerNorm\.gamma", "LayerNorm.weight"),
    (r"LayerNorm\.beta", "LayerNorm.bias"),
    (r"\.weight_g", ".parametrizations.weight.original0"),
    (r"\.weight_v", ".parametrizations.weight.original1"),
    (r"^model\.language_model\.model|^language_model\.model\.model", "model.language_model"),
)
"""What transformers 5.24 (`conversion_mapping.py`) renames in files of models that hold a timm backbone: DETR, Table
Transformer, RT-DETR, D-FINE, Conditional and Deformable DETR, PP-DocLayout, and "legacy" in every model. A rule with a
boundary ends at the end of a word. Names are found anywhere, in a backbone, too."""

BACKBONE = "model.backbone.model.model."


EARLIER = {
    "vmamba_tiny_s1l8": dict(embed_dim=16, depths=(1, 1, 1, 1)),
    "medmamba_t": dict(embed_dim=16, depths=(1, 1, 1, 1)),
    "mambavision_t": dict(dim=32, depths=(1, 1, 2, 2), num_heads=(4, 8)),
    "roma_tiny": dict(embed_dim=64, depth=3),
    "infvit_pure_4l_patch16_224": dict(embed_dim=64, num_heads=2, depth=1),
    "vir_small_patch16_224": dict(embed_dim=48, depth=2, num_heads=4),
    "vir_hybrid_tiny": dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(4, 4)),
}
"""Models whose mixers had `out_proj` once, and arguments that make them small."""


@pytest.mark.long
def test_transformers_renames_no_parameter():
    rules = [re.compile(f"(?:{pattern})(?!\\w)") for pattern, _ in RENAMED]
    models = {
        timm.models.model_entrypoint(name).__annotations__["return"]: name for name in reversed(registered_models())
    }
    assert len(models) > len(FAMILIES)
    for name in models.values():
        with _Uninitialised():
            own = timm.create_model(name, device="meta").state_dict()
        assert not [key for key in own for rule in rules if rule.search(BACKBONE + key)]
    assert rules[1].search(f"{BACKBONE}stages.0.blocks.0.op.out_proj.weight")


def old(state):
    return {name.replace(".proj_out.", ".out_proj."): value for name, value in state.items()}


def equal(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize("name", EARLIER)
def test_files_of_earlier_versions_load(name):
    """With the model's own filter, and inside a network that has no filter and an `out_proj` of its own."""

    def new():
        return timm.create_model(name, num_classes=3, **EARLIER[name])

    model, other = new(), new()
    assert not equal(other, model)
    state = old(model.state_dict())
    assert sum(key not in model.state_dict() for key in state) > 0
    other.load_state_dict(state, strict=True)
    assert equal(other, model)
    network, strict, by_command = (
        nn.ModuleDict(dict(backbone=x, attn=nn.MultiheadAttention(4, 1))) for x in (model, new(), new())
    )
    saved = old(network.state_dict())
    assert "attn.out_proj.weight" in saved
    strict.load_state_dict(dict(saved), strict=True)
    load_exactly(by_command, saved, "old.pth")
    assert equal(strict, network)
    assert equal(by_command, network)
