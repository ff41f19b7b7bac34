"""Official checkpoints of Axial-VS: every name that the authors' code (mmdet 2) writes, and the name here.

The pixel decoder's names are in a pack of the official code; `test_clips.py` compares what they compute. Names of the
backbone are the same in mmdet 2 and mmdet 3.
"""

import pytest
import torch
from mmengine.registry import MODELS
from support.golden_packs import ROOT, Pack
from torch import nn

from terrazzo.openmmlab.config import load_config

NEAR, OFFLINE = (f"mask2former-axialvs{kind}_r50_8xb1-1{n}k_youtubevis2021" for kind, n in (("", 5), ("-offline", 0)))

# For each official name: the name here, and the shape.
HEAD = {
    "transformer_decoder.post_norm.weight": ("transformer_decoder.post_norm.weight", (256,)),
    "transformer_decoder.post_norm.bias": ("transformer_decoder.post_norm.bias", (256,)),
    "query_embed.weight": ("query_embed.weight", (100, 256)),
    "query_feat.weight": ("query_feat.weight", (100, 256)),
    "level_embed.weight": ("level_embed.weight", (3, 256)),
    "cls_embed.weight": ("cls_embed.weight", (41, 256)),
    "cls_embed.bias": ("cls_embed.bias", (41,)),
    "mask_embed.0.weight": ("mask_embed.0.weight", (256, 256)),
    "mask_embed.0.bias": ("mask_embed.0.bias", (256,)),
    "mask_embed.2.weight": ("mask_embed.2.weight", (256, 256)),
    "mask_embed.2.bias": ("mask_embed.2.bias", (256,)),
    "mask_embed.4.weight": ("mask_embed.4.weight", (256, 256)),
    "mask_embed.4.bias": ("mask_embed.4.bias", (256,)),
}
# In each of the 9 layers `transformer_decoder.layers.<i>.`: cross-attention comes first.
DECODER_LAYER = {
    "attentions.0.attn.in_proj_weight": ("cross_attn.attn.in_proj_weight", (768, 256)),
    "attentions.0.attn.in_proj_bias": ("cross_attn.attn.in_proj_bias", (768,)),
    "attentions.0.attn.out_proj.weight": ("cross_attn.attn.out_proj.weight", (256, 256)),
    "attentions.0.attn.out_proj.bias": ("cross_attn.attn.out_proj.bias", (256,)),
    "attentions.1.attn.in_proj_weight": ("self_attn.attn.in_proj_weight", (768, 256)),
    "attentions.1.attn.in_proj_bias": ("self_attn.attn.in_proj_bias", (768,)),
    "attentions.1.attn.out_proj.weight": ("self_attn.attn.out_proj.weight", (256, 256)),
    "attentions.1.attn.out_proj.bias": ("self_attn.attn.out_proj.bias", (256,)),
    "ffns.0.layers.0.0.weight": ("ffn.layers.0.0.weight", (2048, 256)),
    "ffns.0.layers.0.0.bias": ("ffn.layers.0.0.bias", (2048,)),
    "ffns.0.layers.1.weight": ("ffn.layers.1.weight", (256, 2048)),
    "ffns.0.layers.1.bias": ("ffn.layers.1.bias", (256,)),
    "norms.0.weight": ("norms.0.weight", (256,)),
    "norms.0.bias": ("norms.0.bias", (256,)),
    "norms.1.weight": ("norms.1.weight", (256,)),
    "norms.1.bias": ("norms.1.bias", (256,)),
    "norms.2.weight": ("norms.2.weight", (256,)),
    "norms.2.bias": ("norms.2.bias", (256,)),
}
# For each of the 4 layers of the cross-clip module, whose names here begin with `tracker.`.
TRACKER_LAYER = {
    "transformer_trajectory_self_attention_layers.{}.self_attn.qkv.weight": (768, 256),
    "transformer_trajectory_self_attention_layers.{}.self_attn.qkv.bias": (768,),
    "transformer_trajectory_self_attention_layers.{}.self_attn.proj_q.weight": (256, 256),
    "transformer_trajectory_self_attention_layers.{}.self_attn.proj_q.bias": (256,),
    "transformer_trajectory_self_attention_layers.{}.self_attn.proj_kv.weight": (512, 256),
    "transformer_trajectory_self_attention_layers.{}.self_attn.proj_kv.bias": (512,),
    "transformer_trajectory_self_attention_layers.{}.self_attn.proj.weight": (256, 256),
    "transformer_trajectory_self_attention_layers.{}.self_attn.proj.bias": (256,),
    "transformer_trajectory_self_attention_layers.{}.norm.weight": (256,),
    "transformer_trajectory_self_attention_layers.{}.norm.bias": (256,),
    "conv_short_aggregate_layers.{}._aspp_conv0.weight": (256, 256, 3),
    "conv_short_aggregate_layers.{}._aspp_conv0.bias": (256,),
    "conv_short_aggregate_layers.{}._aspp_conv1.weight": (256, 256, 3),
    "conv_short_aggregate_layers.{}._aspp_conv1.bias": (256,),
    "conv_short_aggregate_layers.{}._aspp_conv2.weight": (256, 256, 3),
    "conv_short_aggregate_layers.{}._aspp_conv2.bias": (256,),
    "conv_short_aggregate_layers.{}._proj_conv_bn_act.conv.weight": (256, 768, 1),
    "conv_short_aggregate_layers.{}._proj_conv_bn_act.norm.weight": (256,),
    "conv_short_aggregate_layers.{}._proj_conv_bn_act.norm.bias": (256,),
    "conv_norms.{}.weight": (256,),
    "conv_norms.{}.bias": (256,),
}
ACTIVATION = {
    "activation_proj.weight": ("activation_proj.weight", (1, 256)),
    "activation_proj.bias": ("activation_proj.bias", (1,)),
}


def head_names(offline):
    """The official names of the head without its pixel decoder: the name here, and the shape."""
    names = dict(HEAD)
    for index in range(9):
        place = f"transformer_decoder.layers.{index}."
        names |= {place + official: (place + own, shape) for official, (own, shape) in DECODER_LAYER.items()}
    if offline:
        names |= ACTIVATION
        for index in range(4):
            for name, shape in TRACKER_LAYER.items():
                names[name.format(index)] = (f"tracker.{name.format(index)}", shape)
    return names


@pytest.mark.parametrize("name", [NEAR, OFFLINE])
def test_official_names_load(name):
    """All names of the model at full size load, none is left over, and each parameter goes to its place."""
    with torch.device("meta"):
        model = MODELS.build(load_config(name, "/elsewhere").model)
        names = head_names(offline=name == OFFLINE)
        decoder = Pack(ROOT / "axialvs" / "pixel_decoder_T2_full.npz").meta["state"]
        head = {official: nn.Parameter(torch.empty(shape)) for official, (_, shape) in names.items()}
        head |= {f"pixel_decoder.{official}": nn.Parameter(torch.empty(shape)) for official, shape, _ in decoder}
    state = {f"panoptic_head.{official}": value for official, value in head.items()}
    state |= {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    model.load_state_dict(state, assign=True)
    found = dict(model.track_head.named_parameters())
    assert len(found) == len(head)
    for official, (own, _) in names.items():
        assert found[own] is head[official], official
