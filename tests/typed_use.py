"""How users call the public names; mypy checks this file (`make check`), and nothing runs it."""

import timm
import torch
from typing_extensions import assert_type

import terrazzo
from terrazzo.errors import InputError
from terrazzo.kernels import neighborhood_attention, use_backend
from terrazzo.openmmlab import Classifier, TerrazzoBackbone

model = timm.create_model("vit_small_patch16_224")
assert_type(terrazzo.convert_attention(model, "llsa", layers=[0, 1], topk=8), torch.nn.Module)
assert_type(terrazzo.reduce(model, method="mctf", r=16), torch.nn.Module)
assert_type(terrazzo.calibrate(model, [torch.zeros(1, 3, 224, 224)]), torch.nn.Module)
assert_type(terrazzo.reparameterize(model), torch.nn.Module)
assert_type(terrazzo.mixers(), tuple[str, ...])

query = torch.zeros(1, 7, 7, 2, 8)
with use_backend("portable"):
    assert_type(neighborhood_attention(query, query, query, kernel_size=(3, 3)), torch.Tensor)

try:
    TerrazzoBackbone(name="dinat_mini", out_indices=(1, 2, 3))
    Classifier(backbone={"name": "dinat_mini"})
except InputError as error:
    assert_type(error, InputError)
