"""RGT and RGT-S."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from support.golden_packs import Pack, packs
from support.mixer_contract import MixerPack
from support.mixer_contract import packs as operator_packs
from support.restoration import SMALL_NETWORKS
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.backbones._rectangles import rectangle_attention
from terrazzo.backbones._recursion import Generalization, power_below, recursions_of
from terrazzo.errors import InputError
from terrazzo.restoration import rgt
from terrazzo.restoration.rgt import LocalAttention, RecursiveAttention
from terrazzo.tools import results
from terrazzo.tools.reports import cards

COUNTS = {
    "rgt_s_x2": 10_051_055,
    "rgt_s_x3": 10_235_695,
    "rgt_s_x4": 10_198_767,
    "rgt_x2": 13_217_831,
    "rgt_x3": 13_402_471,
    "rgt_x4": 13_365_543,
}
(PACK,) = packs("rgt")


def small(name="rgt_s_x2", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL_NETWORKS["rgt"], **options}).eval()


def pictures(*size, dtype=torch.float32):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def lively(module):
    """Random numbers in every parameter, in float64."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module


def test_parameters():
    """The stored counts, which the contract compares with the networks, agree with the authors' code."""
    stored = {row.variant: row.p50 for row in results.read(cards.COUNTS["restoration"]) if row.metric == "parameters"}
    assert {name: stored[name] for name in COUNTS} == COUNTS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "macs"), [("rgt_s_x4", 191.46), ("rgt_x4", 248.91)])
@torch.no_grad()
def test_multiply_adds(name, macs):
    """Of convolutions, linear layers and the products of attention, for a picture of 128 x 128."""
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, 3, 128, 128, device="meta")).shape == (1, 3, 512, 512)
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=1e-3)


class Loaded:
    """The authors' state dict of a pack, and the network that loaded it."""

    def __init__(self):
        self.pack = Pack(PACK)
        self.weights = self.pack.weights()
        self.model = timm.create_model(self.pack.meta["variant"], dtype=torch.float64).eval()
        self.model.load_state_dict({"params": self.weights})

    @torch.no_grad()
    def check(self, case):
        found, wanted = self.pack.sample(case, 0, self.model(self.pack.image(case).abs() / 4))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * case["stages"][0]["std"])


@pytest.mark.slow
def test_golden():
    """The authors' network, from its state dict. For this size it computes masks as we do."""
    loaded = Loaded()
    loaded.check(loaded.pack.meta["cases"][1])


@pytest.mark.slow
def test_golden_with_masks_of_the_file(monkeypatch):
    """For 64 x 64 the authors' network takes masks from the state dict, and the pack has random numbers there."""
    loaded = Loaded()
    masks = {key: value for key, value in loaded.weights.items() if "attn_mask" in key}

    def attended(query, key, value, window, bias, shift):
        """The definition, with a mask for each window."""
        if not any(shift):
            return rectangle_attention(query, key, value, window, bias)
        mask = masks.pop(next(iter(masks)))  # windows N N, in the order of blocks and branches
        batch, height, width, heads, _ = query.shape
        rows, columns = height // window[0], width // window[1]
        maps = (x.roll((-shift[0], -shift[1]), (1, 2)) for x in (query, key, value))
        q, k, v = (
            x.reshape(batch, rows, window[0], columns, window[1], heads, -1)
            .permute(0, 1, 3, 5, 2, 4, 6)
            .reshape(rows * columns, heads, window[0] * window[1], -1)
            for x in maps
        )
        out = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias + mask[:, None]).softmax(-1) @ v
        out = out.reshape(batch, rows, columns, heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return out.reshape(batch, height, width, heads, -1).roll(shift, (1, 2))

    monkeypatch.setattr(rgt, "rectangle_attention", attended)
    loaded.check(loaded.pack.meta["cases"][0])
    assert not masks


def test_shifted_blocks_are_those_with_masks():
    names = [name for name, *_ in Pack(PACK).meta["state"]]
    model = timm.create_model("rgt_s_x4", device="meta")
    shifted = {name for name, module in model.named_modules() if getattr(module, "shifted", False)}
    assert shifted == {name.removesuffix(".attn_mask_0") for name in names if name.endswith("attn_mask_0")}
    kept = [name for name in names if not re.search(r"attn_mask_[01]$|relative_position_index$", name)]
    assert set(model.state_dict()) == set(kept)


@pytest.mark.parametrize("name", operator_packs("rgt_mixers"))
def test_golden_attention(name):
    """Both attentions, with every gradient, against the authors' modules."""
    pack = MixerPack("rgt_mixers", name)
    meta, x = pack.meta, pack["x"]
    if meta["op"] == "rg_sa":
        module = RecursiveAttention(x.shape[2], meta["heads"], meta["c_ratio"])
    else:
        module = LocalAttention(x.shape[2], meta["heads"], tuple(meta["split_size"]), meta["shifted"])
    module.double().train(meta.get("training", False))
    own = {key: value for key, value in module.state_dict().items() if key.endswith("rpe_biases")}
    module.load_state_dict(own | {key[2:]: pack[key] for key in pack.arrays if key.startswith("w.")})
    x = x.unflatten(1, (meta["height"], meta["width"])).requires_grad_()
    out = module(x).flatten(1, 2)
    rounded = meta["arrays"]["out"][1] == "float32"
    torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-6 if rounded else 1e-9)
    if "grad" not in pack.arrays:
        return
    out.backward(pack["grad"])
    grads = {"dx": x.grad.flatten(1, 2), **{f"dw.{key}": p.grad for key, p in module.named_parameters()}}
    assert grads.keys() == {key for key in pack.arrays if re.match(r"dx$|dw\.", key)}
    for key, grad in grads.items():
        limit = 1e-6 if meta["arrays"][key][1] == "float32" else 1e-9
        torch.testing.assert_close(grad, pack[key], rtol=0, atol=limit * max(1, pack[key].abs().max().item()))


@pytest.mark.parametrize(
    ("size", "training", "times"),
    [
        *(((64, 64), training, 2) for training in (True, False)),
        ((128, 128), True, 2),
        ((256, 256), True, 3),
        ((256, 256), False, 2),
        ((1023, 700), False, 2),
        ((1024, 700), False, 3),
        ((1024, 1024), True, 4),
        ((4096, 4096), False, 4),
        ((16, 16), False, 2),
        ((16, 16), True, 1),
        ((16, 1024), False, 2),  # the authors' 3 leaves no map
    ],
)
def test_recursions(size, training, times):
    assert recursions_of(size, training) == recursions_of(size[::-1], training) == times


def test_powers():
    for power in range(1, 8):
        assert [power_below(4**power + i) for i in (-1, 0, 1)] == [power - 1, power, power]
    assert power_below(0) == 0


@torch.no_grad()
def test_fixed_recursions():
    """A fixed number is that number in training and evaluation; None follows the authors."""
    model, x = lively(small(depth=(2,))), pictures(40, 64, dtype=torch.float64)
    wanted = model(x)
    for recursions, equal in ((2, True), (1, False), (3, False)):
        model.recursions = recursions
        assert torch.equal(model(x), wanted) == equal
    assert model(pictures(5, 40).double()).shape == (1, 3, 10, 80)
    module = RecursiveAttention(8, 2)
    x = torch.randn(1, 20, 20, 8)
    assert torch.equal(module.train()(x), module(x, 1))
    assert torch.equal(module.eval()(x), module(x, 2))


@torch.no_grad()
def test_group_without_branches_is_the_identity():
    group = lively(small()).layers[0]
    group.conv.weight.zero_()
    group.conv.bias.zero_()
    for block in group.blocks:
        block.gamma.zero_()
    x = torch.randn(1, 16, 24, 24, dtype=torch.float64)
    assert torch.equal(group(x), x)


@torch.no_grad()
def test_gamma_scales_the_input_of_a_block():
    block, x = lively(small()).layers[0].blocks[1], torch.randn(1, 16, 24, 24, dtype=torch.float64)
    with_gamma = block(x)
    gamma = block.gamma.clone()
    block.gamma.zero_()
    torch.testing.assert_close(with_gamma, block(x) + gamma * x)


@torch.no_grad()
def test_constant_map():
    """Global attention keeps a map constant, if no convolution sees the border."""
    module = lively(RecursiveAttention(12, 3))
    module.dwconv.weight.copy_(torch.eye(9, dtype=torch.float64)[4].view(1, 1, 3, 3).expand(12, -1, -1, -1))
    module.cpe.weight.zero_()
    out = module.eval()(torch.randn(12, dtype=torch.float64).expand(1, 35, 50, 12))
    torch.testing.assert_close(out, out[:, :1, :1].expand_as(out))


def local_attention(shifted):
    """A module whose output is that of both branches, and whose positions count nothing."""
    module = lively(LocalAttention(8, 4, (4, 8), shifted))
    with torch.no_grad():
        module.proj.weight.copy_(torch.eye(8))
        for layer in (module.proj.bias, module.get_v.weight, module.get_v.bias):
            layer.zero_()
        for branch in module.attns:
            branch.pos.pos3[2].weight.zero_()
            branch.pos.pos3[2].bias.zero_()
    return module


@torch.no_grad()
def test_windows_without_queries_are_means():
    module, x = local_attention(False), torch.randn(1, 16, 24, 8, dtype=torch.float64)
    module.qkv.weight[:8] = 0
    module.qkv.bias[:8] = 0
    values = module.qkv(x)[..., 16:].permute(0, 3, 1, 2)
    means = [
        F.avg_pool2d(half, window).repeat_interleave(window[0], 2).repeat_interleave(window[1], 3)
        for half, window in zip(values.chunk(2, 1), ((4, 8), (8, 4)))
    ]
    torch.testing.assert_close(module(x), torch.cat(means, 1).permute(0, 2, 3, 1))


@torch.no_grad()
def test_shifted_windows_do_not_mix_borders():
    """If all values of a shifted window are equal, the result is that value, also where borders meet."""
    generator = torch.Generator().manual_seed(3)
    for window, shift in (((4, 8), (2, 4)), ((8, 4), (4, 2))):
        q, k = torch.randn(2, 1, 16, 16, 2, 4, dtype=torch.float64, generator=generator)
        # The parts of the rolled windows: a value for each, also for both parts of a window that the border cuts.
        places = [
            (torch.arange(16) + side - step).div(side, rounding_mode="floor") for side, step in zip(window, shift)
        ]
        value = (10 * places[0][:, None] + places[1]).double()[None, :, :, None, None].expand(1, -1, -1, 2, 4)
        bias = torch.randn(2, 32, 32, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(rectangle_attention(q, k, value, window, bias, shift), value)
        mixed = rectangle_attention(q, k, value, window, bias)
        assert (mixed - value).abs().max() > 0.1


@torch.no_grad()
def test_mean_kernels_are_average_pooling():
    module = Generalization(6, 6).double()
    module.reduction1.weight.fill_(1 / 16)
    module.reduction1.bias.zero_()
    torch.nn.init.dirac_(module.dwconv.weight, groups=6)
    torch.nn.init.dirac_(module.conv.weight)
    for layer in (module.dwconv, module.conv):
        layer.bias.zero_()
    module.norm_act = torch.nn.Identity()
    x = torch.randn(1, 50, 37, 6, dtype=torch.float64)
    z, size = module.summary(x, 2)
    assert size == (3, 2)
    torch.testing.assert_close(z, F.avg_pool2d(x.permute(0, 3, 1, 2), 16).flatten(2).transpose(1, 2))


def test_masks_and_indices_of_files():
    """What the authors' files have besides weights is left out."""
    model = small()
    state = {f"module.{name}": value + 0.5 for name, value in model.state_dict().items()}
    state["module.layers.1.blocks.0.attn.attn_mask_0"] = torch.zeros(16, 32, 32)
    state["module.layers.0.blocks.0.attn.attns.0.relative_position_index"] = torch.zeros(32, 32, dtype=torch.int64)
    assert not any(model.load_state_dict({"params": state}))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"module.{name}"]), name


def test_the_table_of_offsets_may_be_missing():
    model = small()
    state = model.state_dict()
    without_offsets = {name: value for name, value in state.items() if not name.endswith("rpe_biases")}
    assert not any(model.load_state_dict({"params": without_offsets}))


@pytest.mark.slow
@torch.no_grad()
def test_compiles_for_any_size():
    """With a shifted block; more recursions of a larger picture make another graph."""
    model = small(depth=(1, 2))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in ((33, 47), (64, 70), (20, 1030)):
        torch.testing.assert_close(compiled(pictures(*size)), model(pictures(*size)))


@torch.no_grad()
def test_other_settings():
    """Three convolutions after a group, pictures with one channel and another range."""
    model = small(resi_connection="3conv", in_chans=1, img_range=255.0)
    assert model(torch.rand(1, 1, 16, 16)).shape == (1, 1, 32, 32)
    assert model.conv_after_body[2].weight.shape == (6, 6, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(upscale=5), "upscale must be 2, 3 or 4, got 5"),
        (dict(num_heads=3), "num_heads must be even and divide embed_dim 24, got 3"),
        (dict(split_size=(4, 6)), r"split_size must be two sides of which one divides the other.*got \(4, 6\)"),
        (dict(c_ratio=0.3), "c_ratio times embed_dim 24 must be a multiple of num_heads 2, got 0.3"),
        (dict(recursions=0), "recursions must be 1 or more, or None for the authors' rule, got 0"),
        (dict(depth=()), "depth must be the number of blocks of each group"),
        (dict(mlp_ratio=0.3), "mlp_ratio times embed_dim 24"),
        (dict(resi_connection="2conv"), "resi_connection must be '1conv' or '3conv', got '2conv'"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(InputError, match=message):
        small(**options)
