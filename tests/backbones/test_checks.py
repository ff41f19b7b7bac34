"""Inputs that are not images or numbers are refused in one line; NumPy's numbers and scalar tensors are numbers."""

import inspect

import numpy as np
import pytest
import timm
import torch
from support.families import smallest
from support.seeded import image

import terrazzo
from terrazzo.errors import InputError

NAN, INF = float("nan"), float("inf")


def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, img_size=64)


@pytest.fixture(scope="module", params=[*smallest(), "reduced"])
def models(request):
    if request.param == "reduced":
        return [terrazzo.reduce(vit(), r=2)]
    features = timm.create_model(request.param, features_only=True, device="meta")
    return [timm.create_model(request.param, device="meta"), features]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[0],
        lambda x: x[:, :1],
        lambda x: torch.cat([x, x], 1),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.to(torch.uint8),
        lambda x: x.bool(),
        lambda x: x[None],
        lambda x: "picture.png",
    ],
)
def test_no_image(models, spoil):
    for model in models:
        x = image((64, 64), batch=2).to(next(model.parameters()).device)
        with pytest.raises(InputError, match=r"images \(B, 3, H, W\), got [^\n]*$"):
            model(spoil(x))


BAD = [
    *(dict(r=r) for r in ("8", None, NAN, INF, -INF, True, 2.5, -1, [1], torch.ones(2), 1j)),
    *(dict(blocks=blocks) for blocks in (3, "3", [1.5], [NAN], ["1"], [None], [9], [True], torch.tensor(3))),
    *(dict(window=window) for window in ("14", NAN, 0, True, 2.5)),
    *(dict(window=2, blocks=(1,), global_blocks=blocks) for blocks in (3, "3", [0.5], [7])),
    *(dict(restore=restore) for restore in ("none", None, ["copy"], 1)),
    *(dict(criteria=criteria) for criteria in (3, (1, NAN, 2), "abc", (1, 2), (1, "2", 3), (1, 2, -3))),
    *(dict(multiple=multiple) for multiple in ("2", 0, None, 1.5)),
    *(dict(r_eval=r) for r in ("1", NAN, True)),
    *(dict(method="asvit", thresholds=values) for values in ((0.1, NAN, 0.2), 3, "abc", (0.1,), (INF, 0.1, 0.1))),
    *(dict(method="asvit", form="fixed", keep=keep) for keep in ((NAN, 0.5, 0.3), 0.5, "abc", (0.7, 0.5, 2))),
    *(dict(method="asvit", blocks=blocks) for blocks in (2, "2", [0])),
    *(dict(method=method) for method in (None, ["mctf"], "none")),
]


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_no_number(arguments):
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        terrazzo.reduce(vit(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        (dict(r=np.int64(3)), dict(r=3)),
        (dict(r=np.float32(0.25)), dict(r=0.25)),
        (dict(r=torch.tensor(3)), dict(r=3)),
        (dict(blocks=np.array([1, 2]), r=1), dict(blocks=(1, 2), r=1)),
        (dict(blocks=(i for i in (1, 2)), r=1), dict(blocks=(1, 2), r=1)),
        (
            dict(method="asvit", blocks=iter((1, 2)), thresholds=torch.tensor([0.05, 0.06])),
            dict(method="asvit", blocks=(1, 2), thresholds=(0.05, 0.06)),
        ),
        (
            dict(window=np.int64(2), blocks=(1,), global_blocks=np.array([3]), r=1),
            dict(window=2, blocks=(1,), global_blocks=(3,), r=1),
        ),
    ],
)
def test_numbers(arguments, plain):
    outputs = []
    for given in (arguments, plain):
        torch.manual_seed(0)
        outputs.append(terrazzo.reduce(vit(), **given).eval()(image((64, 64))))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", smallest())
def test_img_size_is_a_side_or_two(name):
    if "img_size" not in inspect.signature(type(timm.create_model(name, device="meta"))).parameters:
        return  # the family takes any image without being told
    one, two = (timm.create_model(name, img_size=size, device="meta") for size in (96, (96, 96)))
    assert [x.shape for x in one.parameters()] == [x.shape for x in two.parameters()]
    for wrong in ("96", (96, 96, 96), 0):
        with pytest.raises(InputError, match="img_size must be"):
            timm.create_model(name, img_size=wrong, device="meta")
