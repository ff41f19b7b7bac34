"""transformers' DETR with a backbone of terrazzo: a saved model is the same model after loading.

DETR renames `out_proj` to `o_proj` when it loads a file, wherever the name occurs, and back when it saves. A backbone
whose own parameters have this name would lose their weights without an error.
"""

import pytest
import torch

import terrazzo  # noqa: F401

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5 or later")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "mambavision_t", "vir_hybrid_tiny"])
def test_detr_is_the_same_after_loading(name, tmp_path):
    torch.manual_seed(0)
    backbone = transformers.TimmBackboneConfig(backbone=name, out_indices=[3])
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    config = transformers.DetrConfig(
        backbone_config=backbone, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, **layers
    )
    model = transformers.DetrForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    again, info = transformers.DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(x).logits, model(x).logits)
