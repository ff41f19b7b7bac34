"""`terrazzo.convert_attention` on timm's plain ViTs."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from support.module_contract import check_adapters, check_dynamic_int8, check_hooks, check_sharded
from support.seeded import build, image
from timm.layers import Attention

import terrazzo
from terrazzo.backbones._place import Place
from terrazzo.errors import InputError

SMALL = dict(embed_dim=96, num_heads=3, depth=3)
# The models have, in turn: a class token and layer scale (DINOv2); registers and norms of queries and keys; a
# distillation token; attention pooling without prefix tokens (SigLIP); a norm before the blocks (CLIP); rotary
# positions with registers (DINOv3); rotary positions with a gated MLP and separate projections (EVA-02); rotary
# positions with attention of another class (PE).
MODELS = {
    "vit_small_patch14_dinov2": dict(SMALL, img_size=112),
    "vit_small_patch16_224": dict(SMALL, img_size=128, reg_tokens=4, no_embed_class=True, qk_norm=True),
    "deit_tiny_distilled_patch16_224": dict(SMALL, img_size=128),
    "vit_base_patch16_siglip_224": dict(SMALL, img_size=128),
    "vit_base_patch16_clip_224": dict(SMALL, img_size=128),
    "vit_small_patch16_dinov3": dict(SMALL, img_size=128),
    "eva02_tiny_patch14_224": dict(SMALL, img_size=112),
    "vit_pe_core_tiny_patch16_384": dict(SMALL, img_size=128),
}


QUICK = ("vit_small_patch14_dinov2", "vit_small_patch16_dinov3")
COMPILED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def side(name):
    return MODELS[name]["img_size"]


@pytest.fixture(params=MODELS)
def named(request):
    return request.param, build(request.param, **MODELS[request.param])


@torch.no_grad()
def test_softmax_changes_nothing(named):
    """No layers, and "softmax" for all layers, give the model's own class and outputs."""
    name, vit = named
    x, kind = image((side(name), side(name))), type(vit)
    wanted, maps = vit.forward_intermediates(x, indices=[0, 2])
    for arguments in (dict(mixer="hedgehog", layers=[]), dict(mixer="softmax")):
        assert terrazzo.convert_attention(vit, **arguments) is vit
        found, own = vit.forward_intermediates(x, indices=[0, 2])
        assert all(torch.equal(a, b) for a, b in zip((found, *own), (wanted, *maps)))
    terrazzo.convert_attention(vit, "hedgehog")
    assert not torch.allclose(vit.forward_features(x), wanted)
    terrazzo.convert_attention(vit, "softmax")
    assert type(vit) is kind
    assert torch.equal(vit.forward_features(x), wanted)


@torch.no_grad()
def test_softmax_as_a_mixer(named):
    """A mixer gets the queries, keys and values of the host's own attention, with norms and rotary positions."""
    name, vit = named
    x = image((side(name), side(name)))
    wanted = vit.forward_features(x)
    terrazzo.convert_attention(vit, "hedgehog", layers=[1])
    vit.blocks[1].attn.mixer = Recorder().eval()
    torch.testing.assert_close(vit.forward_features(x), wanted)
    place = vit.blocks[1].attn.mixer.place
    rows = side(name) // vit.patch_embed.patch_size[0]
    assert place.grid == (rows, rows)
    assert place.prefix == vit.num_prefix_tokens
    assert place.x.shape == (1, place.prefix + rows * rows, 96)
    key, positions = vit.blocks[1].attn.mixer.key, torch.tensor([0, rows + 1, rows * rows - 1])
    keyed = place.keyed(place.raw_key[:, :, place.prefix + positions], positions)
    torch.testing.assert_close(keyed, key[:, :, place.prefix + positions])


class Recorder(torch.nn.Module):
    """Softmax attention that remembers where the tokens stood."""

    def forward(self, query, key, value, place):
        self.key, self.place = key, place
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def test_names_and_state(named):
    """Only the mixer's own parameters are new; timm's weights load without them."""
    _name, vit = named
    before = vit.state_dict()
    terrazzo.convert_attention(vit, "hedgehog", layers=[0, 2])
    added = [key for key in vit.state_dict() if key not in before]
    assert added == [f"blocks.{i}.attn.mixer.{which}_map" for i in (0, 2) for which in ("query", "key")]
    assert vit.conversion == {0: dict(mixer="hedgehog"), 2: dict(mixer="hedgehog")}
    missing, unexpected = vit.load_state_dict(before, strict=False)
    assert missing == added
    assert not unexpected


def test_trains_copies_and_checkpoints(named):
    name, vit = named
    model, x = terrazzo.convert_attention(vit, "hedgehog", layers=[0, 2]), image((side(name), side(name)))
    wanted = model.forward_features(x)
    assert torch.equal(copy.deepcopy(model).forward_features(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model)).forward_features(x), wanted)
    wanted.square().mean().backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert all(plain[key].abs().sum() > 0 for key in plain if "mixer" in key)
    model.zero_grad()
    model.set_grad_checkpointing()
    model.forward_features(x).square().mean().backward()
    for key, grad in plain.items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, grad)


@torch.no_grad()
def test_threads(named):
    """Two threads with different grids do not disturb each other."""
    name, vit = named
    model = terrazzo.convert_attention(vit, "hedgehog", layers=[1])
    images = [image((side(name), side(name)), batch=n) for n in (1, 2, 1, 2)]
    wanted = [model.forward_features(x) for x in images]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: model.forward_features(x), images))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("named", COMPILED, indirect=True)
def test_compile(named):
    """Dynamo traces the whole model."""
    name, vit = named
    model = terrazzo.convert_attention(vit, "hedgehog", layers=[1])
    x = image((side(name), side(name)))
    torch.compiler.reset()
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model.forward_features(x))


@torch.no_grad()
def test_with_reduce():
    """A mixer without a grid runs on merged tokens, in either order of the calls; other pairs are refused."""
    x, options = image((224, 224)), dict(r=16, criteria=(1, 0, 40))
    first = terrazzo.reduce(terrazzo.convert_attention(build("deit_tiny_patch16_224"), "hedgehog"), **options)
    second = terrazzo.convert_attention(terrazzo.reduce(build("deit_tiny_patch16_224"), **options), "hedgehog")
    assert torch.equal(first(x), second(x))
    assert first.forward_features(x).shape[1] < 197
    wanted = second(x)
    with pytest.raises(InputError, match="layer 1 has the mixer 'hedgehog', and the reducer computes this layer's"):
        terrazzo.reduce(first, r=16)
    assert torch.equal(first(x), wanted)
    reduced = terrazzo.reduce(build("deit_tiny_patch16_224"), method="asvit", form="fixed")
    with pytest.raises(InputError, match="layer 3 has the mixer 'hedgehog', and the reducer computes this layer's"):
        terrazzo.convert_attention(reduced, "hedgehog", layers=[3])
    assert not reduced.conversion
    assert terrazzo.convert_attention(reduced, "hedgehog", layers=[2]).conversion


@torch.no_grad()
@pytest.mark.parametrize("mixer", [dict(mixer="na", kernel=7), dict(mixer="mate", window=4)], ids=lambda x: x["mixer"])
def test_mixers_with_a_grid_refuse_merged_tokens(mixer):
    """In either order of the calls; layers in front of the reduction may have them."""
    x, options = image((128, 128)), dict(r=4, criteria=(1, 0, 40), blocks=(2,))
    message = f"mixer '{mixer['mixer']}' needs tokens on a grid, and the reducer changes the tokens of layer 2"
    model = terrazzo.convert_attention(build("vit_tiny_patch16_224", **SMALL, img_size=128), **mixer)
    wanted, changes = model(x), model.changes
    with pytest.raises(InputError, match=message):
        terrazzo.reduce(model, **options)
    assert torch.equal(model(x), wanted)
    assert model.changes == changes
    reduced = terrazzo.reduce(build("vit_tiny_patch16_224", **SMALL, img_size=128), **options)
    with pytest.raises(InputError, match=message):
        terrazzo.convert_attention(reduced, **mixer)
    assert not reduced.conversion
    terrazzo.convert_attention(reduced, layers=[0, 1], **mixer)
    assert reduced.forward_features(x).shape[1] == 1 + 64 - 4


@torch.no_grad()
def test_neighborhoods_of_the_whole_map(named):
    """Neighborhood attention whose window is the whole map is the model itself."""
    name, vit = named
    x = image((side(name), side(name)))
    wanted = vit.forward_features(x)
    terrazzo.convert_attention(vit, "na", kernel=8)
    torch.testing.assert_close(vit.forward_features(x), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("name", "options", "arguments", "message"),
    [
        ("resnet18", {}, dict(mixer="hedgehog"), "only timm's plain VisionTransformer and Eva can be converted"),
        ("vit_tiny_patch16_224", {}, dict(mixer="tome"), "mixer must be one of .*hedgehog.*, got 'tome'"),
        (
            "vit_tiny_patch16_224",
            {},
            dict(mixer="hedgehog", layers=[12]),
            r"layers must be some of 0 to 11, got \(12,\)",
        ),
        ("vit_tiny_patch16_224", {}, dict(mixer="hedgehog", layers="odd"), "layers must be 'all' or some of 0 to 11"),
        ("vit_tiny_patch16_224", {}, dict(mixer="softmax", topk=8), "'softmax' has no options, got topk"),
        ("vit_tiny_patch16_224", dict(attn_drop_rate=0.1), dict(mixer="hedgehog"), "drops attention weights at 0.1"),
        ("vit_small_patch16_18x2_224", {}, dict(mixer="hedgehog"), "block 0 is not a plain block of timm"),
    ],
)
def test_errors(name, options, arguments, message):
    model = timm.create_model(name, device="meta", **options)
    kind = type(model)
    with pytest.raises(InputError, match=message):
        terrazzo.convert_attention(model, **arguments)
    assert type(model) is kind


def test_masks_are_refused():
    model = terrazzo.convert_attention(build("vit_tiny_patch16_224", depth=1), "hedgehog")
    with pytest.raises(InputError, match="takes no mask"):
        model.forward_features(image((224, 224)), attn_mask=torch.zeros(197, 197))
    with pytest.raises(InputError, match="attention with the mixer 'hedgehog' takes no mask"):
        model.blocks[0](torch.zeros(1, 197, 192), attn_mask=torch.zeros(197, 197))


@torch.no_grad()
def test_features_only():
    """timm's wrapper for `features_only=True` can be converted and reduced, too."""
    name, options = "vit_tiny_patch16_224", dict(SMALL, out_indices=(0, 2))
    plain, wrapped = build(name, **SMALL), build(name, features_only=True, **options)
    wrapped.model.load_state_dict(plain.state_dict(), strict=False)
    x = image((224, 224))
    for change in (
        lambda model: terrazzo.convert_attention(model, "hedgehog"),
        lambda model: terrazzo.reduce(model, r=16, criteria=(1, 0, 40)),
    ):
        assert change(wrapped) is wrapped
        wanted = change(plain).forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        for found, map_ in zip(wrapped(x), wanted):
            torch.testing.assert_close(found, map_)


@torch.no_grad()
def test_a_block_alone_mixes_too():
    """A block that is called without the model's state still has its mixer."""
    block = terrazzo.convert_attention(build("vit_tiny_patch16_224", depth=1), "hedgehog").blocks[0]
    x = torch.randn(1, 197, 192, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), block.placed(x, Place((14, 14), 1)))


@pytest.mark.parametrize("check", [check_hooks, check_adapters, check_dynamic_int8, check_sharded])
def test_modules_are_called(check):
    small = dict(embed_dim=48, num_heads=3, depth=3, dynamic_img_size=True, dynamic_img_pad=True)
    check(terrazzo.convert_attention(build("vit_tiny_patch16_224", **small), "hedgehog", layers=[1]))


@torch.no_grad()
def test_a_gate():
    """timm's attention can have a gate; a mixer's output and a reducer's go through it."""
    vit = build("vit_small_patch16_224", **SMALL, img_size=128)
    for block in vit.blocks:
        block.attn = Attention(96, 3, qkv_bias=True, gated=True).eval()
    x = image((128, 128))
    wanted = vit.forward_features(x)
    terrazzo.convert_attention(vit, "hedgehog", layers=[1])
    vit.blocks[1].attn.mixer = Recorder().eval()
    torch.testing.assert_close(vit.forward_features(x), wanted)
    terrazzo.convert_attention(vit, "softmax")
    terrazzo.reduce(vit, r=0)
    torch.testing.assert_close(vit.forward_features(x), wanted)
