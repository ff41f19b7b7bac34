"""MTAIR: the outer network of the authors' code, the blocks of our choice, any size, checkpoints."""

import copy

import pytest
import timm
import torch
from support.restoration_contract import network, pictures

from terrazzo.backbones._weights import RECONSTRUCTED
from terrazzo.errors import InputError, WeightsError
from terrazzo.restoration import mtair


def small(**options):
    return network("mtair", **options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters():
    """The counts of the chosen blocks, and of Restormer's block and PromptIR's prompts."""
    with torch.device("meta"):
        model = timm.create_model("mtair")
        assert count(model) == 45_888_360
        prompts = [getattr(model, f"prompt{level}") for level in (1, 2, 3, 4)]
        assert sum(count(prompt) for prompt in prompts) == 12_734_516
        assert sum(prompt.prompt_param.numel() for prompt in prompts) == 9_912_320
        levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent", "refinement")
        levels += ("decoder_level1", "decoder_level2", "decoder_level3")
        assert sum(count(getattr(model, level)) for level in levels) == 29_356_420
        assert [len(getattr(model, level)) for level in levels] == [4, 6, 6, 8, 4, 4, 6, 6]
        assert count(timm.create_model("mtair", ssm_ratio=2.0)) == 52_915_560
        assert count(timm.create_model("mtair", dual_at_high_res=True)) == 46_803_048
        assert count(mtair.Block(96, 2, 2.66, dual=False, ssm_ratio=1.0)) == 117_872


@pytest.mark.long
def test_shapes():
    with torch.device("meta"):
        model, x = timm.create_model("mtair"), torch.empty(1, 3, 128, 128)
    found = {}

    def keep(name):
        getattr(model, name).register_forward_hook(lambda _, __, out: found.update({name: tuple(out.shape[1:])}))

    for name in ("encoder_level1", "encoder_level2", "encoder_level3", "latent", "decoder_level1", "refinement"):
        keep(name)
    assert model(x).shape == x.shape
    assert found == {
        "encoder_level1": (48, 128, 128),
        "encoder_level2": (96, 64, 64),
        "encoder_level3": (192, 32, 32),
        "latent": (384, 16, 16),
        "decoder_level1": (96, 128, 128),
        "refinement": (96, 128, 128),
    }


def test_which_blocks_scan():
    model = small()
    with_scans = ("encoder_level3", "latent", "decoder_level3", "refinement")
    for name in (*with_scans, "encoder_level1", "encoder_level2", "decoder_level1", "decoder_level2"):
        for own, wanted in ((model, name in with_scans), (small(dual_at_high_res=True), True)):
            assert all((block.op is not None) == wanted for block in getattr(own, name))


@torch.no_grad()
def test_zero_output_is_the_identity():
    model, x = small(), pictures(16, 24)
    assert not torch.allclose(model(x), x, atol=1e-3)
    model.output.weight.zero_()
    assert torch.equal(model(x), x)


@torch.no_grad()
def test_channel_attention():
    """Against the formula, one head after another; its cost grows with the pixels, and its matrix does not."""
    q, k, v = torch.randn(3, 2, 12, 5, 7, dtype=torch.float64)
    temperature = torch.rand(3, 1, 1, dtype=torch.float64) + 1
    found = mtair.channel_attention(q, k, v, temperature)
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        query, key, value = (x[:, own].flatten(2) for x in (q, k, v))
        query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
        wanted = (temperature[head] * query @ key.transpose(1, 2)).softmax(-1) @ value
        torch.testing.assert_close(found[:, own].flatten(2), wanted)
    large = mtair.channel_attention(*(300 * torch.ones(3, 1, 4, 64, 64).half()), torch.ones(1, 1, 1).half())
    assert torch.isfinite(large).all()  # squares of a whole map would leave the range of float16


@torch.no_grad()
def test_prompts():
    """The mean of a map weights the prompts, which are resized to the map."""
    torch.manual_seed(0)
    block = mtair.PromptBlock(8, 6, 4)
    assert block.prompt_param.min() >= 0
    assert block.prompt_param.max() <= 1
    block.linear_layer.weight.zero_()
    block.linear_layer.bias.copy_(torch.tensor([0.0, 0.0, 1e4, 0.0, 0.0]))
    other = copy.deepcopy(block)
    other.prompt_param[[0, 1, 3, 4]] = 7
    x = torch.randn(2, 8, 12, 20)
    torch.testing.assert_close(block(x), other(x))  # the third prompt alone counts
    other.prompt_param[2] = other.prompt_param[2].flip(-1)
    assert not torch.allclose(block(x), other(x), atol=1e-5)


@pytest.mark.long
@torch.no_grad()
def test_checkpoints():
    """The authors' unused convolutions, a prefix and the first axis of their prompts do no harm."""
    model, other = small(), small()
    state = {f"net.{name}": value + 0.1 for name, value in model.state_dict().items()}
    state |= {name: value[None] for name, value in state.items() if name.endswith("prompt_param")}
    unused = {"chnl_reduce1": (64, 64), "chnl_reduce3": (256, 320), "reduce_noise_channel_2": (96, 224)}
    state |= {f"net.{name}.weight": torch.zeros(*shape, 1, 1) for name, shape in unused.items()}
    other.load_state_dict({"state_dict": state})
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value + 0.1)
    assert not [name for name in model.state_dict() if name.startswith(("chnl_reduce", "reduce_noise"))]
    del state["net.output.weight"]
    with pytest.raises(WeightsError, match=r"output\.weight"):
        other.load_state_dict({"state_dict": state})


def test_official_names():
    """Names of the authors' outer network, and of Restormer's blocks in it."""
    names = set(small().state_dict())
    outer = "patch_embed.proj down1_2.body.0 down2_3.body.0 down3_4.body.0 up4_3.body.0 up3_2.body.0 up2_1.body.0"
    outer += " reduce_chan_level3 reduce_chan_level2 output latent.0.norm1.body decoder_level3.0.attn.qkv_dwconv"
    outer += " encoder_level1.0.attn.project_out refinement.0.ffn.project_in prompt4.linear_layer prompt1.conv3x3"
    assert {f"{name}.weight" for name in outer.split()} <= names
    assert {"prompt2.prompt_param", "latent.0.attn.temperature", "encoder_level2.0.norm2.body.bias"} <= names


def test_marked_as_a_reconstruction():
    assert timm.get_pretrained_cfg("mtair").description == RECONSTRUCTED


def test_weight_decay_and_layer_decay():
    from timm.optim import param_groups_layer_decay

    model = small()
    kept = model.no_weight_decay()
    assert {name.rsplit(".", 1)[-1] for name in kept} == {"A_logs", "Ds", "dt_projs_bias"}
    groups = param_groups_layer_decay(model, 0.05, kept, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len({group["lr_scale"] for group in groups}) == 9


@pytest.mark.slow
@torch.no_grad()
def test_onnx(tmp_path):
    onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
    report = onnx_export.export_onnx(small(), pictures(16, 24), tmp_path / "model.onnx")
    assert report.passed
    assert report.compared


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=10), "dim must be a multiple of 4"),
        (dict(heads=(1, 2, 4)), "heads must have a value for each of 4 levels, got 3"),
        (dict(heads=(3, 2, 4, 4)), "heads must divide the channels of each level, got 3 for 8"),
        (dict(num_blocks=(0, 1, 1, 1)), "must be at least 1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=message):
        small(**options)
