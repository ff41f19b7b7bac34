"""Attention and merging within windows of the grid, in MCTF and in timm's ViTs."""

import pytest
import timm
import torch
from support.seeded import build, image

import terrazzo
from terrazzo.backbones import _windows
from terrazzo.backbones._layers import window_counts
from terrazzo.backbones._tokens import Reducer
from terrazzo.errors import InputError
from terrazzo.tools.bench.families import FAMILIES
from terrazzo.tools.inspect.measure import measure

SMALL = dict(embed_dim=48, depth=4, blocks=(1, 3), r=0.35, global_blocks=(2,))
ODD = (112, 208)  # 7 x 13 patches; with sides of at most 5: 2 x 3 windows of 4 x 5, the last of each side padded


def small(**kwargs):
    return build("mctf_deit_tiny", **{**SMALL, **kwargs}).double()


def alone(**kwargs):
    return small(**{**kwargs, "window": None, "global_blocks": None})


def run(model, x, before=None):
    """The tokens and the state after all blocks; `before(i, x, state)` may change tokens before a block."""
    x, state = model.begin(x)
    for i, block in enumerate(model.blocks):
        if before is not None:
            x = before(i, x, state)
        x = model.run_unit(block, x, state)
    return x, state


class TestGeometry:
    @pytest.mark.parametrize("side", [1, 7, 13, 14, 15, 60, 64])
    @pytest.mark.parametrize("window", [1, 4, 14, 16])
    def test_windows_are_even(self, side, window):
        length = _windows.even(side, window)
        (count, _) = window_counts((side, side), (length, length))
        assert count == -(-side // window)
        assert length <= window
        assert (count - 1) * length < side <= count * length < side + count

    def test_the_spread_is_vitdets(self):
        assert _windows.spread(12) == (2, 5, 8, 11)
        assert _windows.spread(24) == (5, 11, 17, 23)
        assert _windows.spread(2) == (0, 1)

    @pytest.mark.parametrize("grid", [(4, 6), (7, 13), (5, 2)])
    def test_there_and_back(self, grid):
        window = tuple(_windows.even(side, 3) for side in grid)
        rows, columns = window_counts(grid, window)
        x = torch.arange(1.0, grid[0] * grid[1] + 1).view(1, -1, 1)
        found = _windows.to_windows(x, grid, window)
        padded = torch.zeros(rows * window[0], columns * window[1])
        padded[: grid[0], : grid[1]] = x.view(grid)
        squares = [part for line in padded.split(window[0]) for part in line.split(window[1], 1)]
        assert torch.equal(found.flatten(), torch.cat([square.flatten() for square in squares]))
        assert torch.equal(_windows.from_windows(found, grid, window), x)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"norm_outputs": True, "cells_first": True, "criteria": (1, 0, 40)}], ids=str)
def test_one_window_is_the_whole_to_the_bit(options):
    x = image(ODD, batch=2).double()
    model, wanted = small(window=13, **options), alone(**options)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert torch.equal(model(x), wanted(x))
    for found, own in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (model, wanted))):
        assert torch.equal(found, own)
    assert not torch.allclose(small(window=5, **options)(x), wanted(x))


@torch.no_grad()
def test_blocks_by_hand():
    """A windowed block equals the block on each unpadded window with a copy of the class token."""
    model = small(window=5, r=0, blocks=(), depth=2, global_blocks=(1,))
    x, state = model.begin(image(ODD, batch=2).double())
    whole = x[:, 1:].unflatten(1, (7, 13))
    wanted, front = torch.empty_like(whole), 0
    for rows in (slice(0, 4), slice(4, 7)):
        for columns in (slice(0, 5), slice(5, 10), slice(10, 13)):
            part = whole[:, rows, columns]
            out = model.blocks[0](torch.cat([x[:, :1], part.flatten(1, 2)], 1))
            wanted[:, rows, columns] = out[:, 1:].unflatten(1, part.shape[1:3])
            front = front + out[:, :1] * part.shape[1] * part.shape[2] / 91
    wanted = torch.cat([front, wanted.flatten(1, 2)], 1)
    x = model.run_unit(model.blocks[0], x, state)
    torch.testing.assert_close(model.reducer.restored(x, state, "copy"), wanted, rtol=0, atol=1e-12)
    x = model.run_unit(model.blocks[1], x, state)
    wanted = model.blocks[1](wanted)
    torch.testing.assert_close(model.reducer.restored(x, state, "copy"), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.to_features(x, state), model.norm(wanted), rtol=0, atol=1e-12)


class TestMerging:
    @torch.no_grad()
    @pytest.mark.parametrize("options", [{}, {"cells_first": True, "criteria": (1, 0, 40)}], ids=str)
    def test_windows_are_not_crossed(self, options):
        """Each window keeps the same number of tokens, and every patch counts once."""
        model = small(window=5, **options)
        x, state = run(model, image(ODD, batch=2).double())
        inside = 1 + 4 * 5
        fusion = model.reducer.reducer
        counts = [inside - fusion.count(inside, fusion.r)]
        counts.append(counts[0] - fusion.count(counts[0], fusion.r))
        assert [level.merged.shape[1] for level in state.levels] == [1 + 6 * (count - 1) for count in counts]
        assert inside > counts[0] > counts[1]
        assert x.shape[1] == state.levels[-1].merged.shape[1]
        before = inside
        for level, count in zip(state.levels, counts):
            window = (torch.arange(6 * (before - 1)) // (before - 1)).expand(2, -1)
            assert torch.equal((level.map[:, 1:] - 1) // (count - 1), window)
            assert (level.map[:, 0] == 0).all()
            assert (level.size.sum(1) == 1 + 7 * 13).all()
            before = count

    @torch.no_grad()
    def test_another_number_for_one_forward(self):
        """The reducer gets its options for a forward pass also through windows."""
        model = small(window=5)
        tokens = [model.forward_features(image(ODD).double(), **choice).shape[1] for choice in ({}, {"r": 1}, {"r": 0})]
        assert tokens[1:] == [1 + 6 * (4 * 5 - 2), 1 + 7 * 13]  # padding is removed if nothing is merged
        assert tokens[0] < tokens[1]

    @torch.no_grad()
    def test_cells_are_of_the_grid(self):
        """The first merge in windows joins only neighbours in the image."""
        model = small(window=4, cells_first=True, criteria=(1, 0, 40), blocks=(1,))
        _, state = run(model, image((128, 128)).double())
        found = state.levels[0].map[:, 1:].unsqueeze(2)
        members = _windows.from_windows(found, (8, 8), (4, 4)).view(8, 8)
        own = members[::2, ::2].flatten().tolist()
        assert len(set(own)) == 16, "a cell has lost its token"

    @torch.no_grad()
    def test_idle_blocks(self, monkeypatch):
        """If blocks do nothing, every position gets its input back after merging in windows."""
        model = small(window=5)
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        x = image(ODD, batch=2).double()
        wanted, _ = model.begin(x)
        left, state = run(model, x)
        assert len(state.levels) == 2
        torch.testing.assert_close(model.reducer.restored(left, state, "delta"), wanted, rtol=0, atol=1e-12)

    @torch.no_grad()
    @pytest.mark.parametrize("mode", ["copy", "delta", "soft"])
    def test_padding_is_seen_by_nobody(self, mode):
        """The values of padding affect neither attention, nor merging, nor the restored positions."""
        model, x = small(window=5, criteria=(1, 0, 40)), image(ODD, batch=2).double()

        def spoil(i, x, state):
            if state.window is None:
                return x
            assert i != 1 or (state.size == 0).sum() == 2 * (8 * 15 - 7 * 13)
            return torch.where(state.size.unsqueeze(2) == 0, 3 * torch.randn_like(x), x)

        found, wanted = (model.reducer.restored(*run(model, x, before), mode) for before in (spoil, None))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)

    @torch.no_grad()
    def test_images_are_apart(self):
        model, x = small(window=5), image(ODD, batch=3).double()
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-12)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [tuple(found.shape) for found in maps] == [(3, 48, 7, 13)] * 4


def test_gradients():
    """Every parameter gets a gradient, and gradient checkpointing does not change it."""
    x, found = image(ODD).double(), []
    for checkpoints in (False, True):
        model = small(window=5, norm_outputs=True)
        model.set_grad_checkpointing(checkpoints)
        maps = model.forward_intermediates(x, intermediates_only=True)
        (sum(y.square().mean() for y in maps) + model(x).square().mean()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(grad, found[1][name], rtol=0, atol=1e-12)


@torch.no_grad()
def test_half_precision():
    """The class token is averaged over windows in float32: the average of 100 equal tokens is the same token."""
    model = small(window=2, r=0, blocks=(), depth=2, global_blocks=(1,)).bfloat16()
    x, state = model.begin(image((320, 320)).bfloat16())
    for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
        layer.weight.zero_()
    front = x[:, :1] + model.blocks[0].attn.proj.bias + model.blocks[0].mlp.fc2.bias
    x = model.run_unit(model.blocks[0], x, state)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x[:, :1], front, rtol=0.008, atol=0)
    assert model(image((320, 200)).bfloat16()).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(image((320, 200))).isfinite().all()


def test_cost():
    """Attention's multiply-adds are those of windows with a class token; other multiply-adds stay the same."""
    options = dict(r=0, blocks=(), embed_dim=192, depth=2, device="meta")
    whole = timm.create_model("mctf_deit_tiny", **options)
    model = timm.create_model("mctf_deit_tiny", window=8, global_blocks=(1,), **options)
    tokens, windows = 32 * 32 + 1, 16
    linear = 12 * 192**2
    wanted = linear * (windows - 1) + 2 * 192 * (windows * 65**2 - tokens**2)
    assert measure(model, 512).macs - measure(whole, 512).macs == wanted


@pytest.mark.parametrize(
    ("variant", "gmacs"),
    {
        "deit_tiny": 99.7,
        "merging": 54.2,
        "windows of 16": 51.4,
        "windows of 14": 52.3,
        "merging in windows of 16": 33.2,
        "merging in windows of 14": 34.4,
    }.items(),
)
def test_cost_of_large_images(variant, gmacs):
    """The card states these figures."""
    name, arguments = FAMILIES["mctf_windows"].model_of(variant)
    model = timm.create_model(name, device="meta", **arguments)
    assert measure(model, 1024).macs / 1e9 == pytest.approx(gmacs, abs=0.05)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_for_any_size():
    model = small(window=5, depth=3, blocks=(0,), global_blocks=(1,))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (ODD, (160, 208), (304, 112)):
        x = image(size).double()
        # Results are not exact, because timm resizes positions in float32 for every dtype of the model.
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_onnx(dense, tmp_path):
    """Exports of logits and of dense maps are right, and use operators that TensorRT documents."""
    onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
    import onnx

    from terrazzo.tools.export.tensorrt.operators import problems

    model = small(window=5, depth=2, blocks=(0,), global_blocks=(1,), norm_outputs=dense).float()
    if dense:
        model.forward = lambda x: model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    path = tmp_path / "model.onnx"
    report = onnx_export.export_onnx(model, image(ODD), path, dynamic=("batch",))
    assert report.passed, report
    assert report.worst <= 1e-4
    assert not problems(onnx.load(path))


class TestTimm:
    @torch.no_grad()
    def test_is_mctf_in_windows(self):
        deit, x = build("deit_tiny_patch16_224", depth=4, dynamic_img_size=True), image((224, 160), batch=2)
        model = timm.create_model("mctf_deit_tiny", window=5, **{**SMALL, "embed_dim": 192}).eval()
        model.load_state_dict(terrazzo.backbones.mctf.checkpoint_filter_fn(deit.state_dict(), model), strict=True)
        wanted = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        terrazzo.reduce(deit, r=0.35, blocks=(1, 3), window=5, global_blocks=(2,))
        torch.testing.assert_close(deit(x), model(x))
        for found, own in zip(deit.forward_intermediates(x, indices=[1, 3], intermediates_only=True), wanted):
            torch.testing.assert_close(found, own)

    @torch.no_grad()
    @pytest.mark.parametrize("pool", ["avg", "map", "token"])
    def test_tokens_in_front(self, pool):
        """With no or five prefix tokens, maps and pooling have every position in the grid's order."""
        front = dict(class_token=False, reg_tokens=0) if pool == "map" else dict(reg_tokens=4)
        model = build("vit_tiny_patch16_224", depth=2, global_pool=pool, **front)
        x = image((224, 224), batch=2)
        wanted = terrazzo.reduce(model, r=0)(x)
        terrazzo.reduce(model, r=0, blocks=(), window=14)
        assert torch.equal(model(x), wanted)
        terrazzo.reduce(model, r=0, blocks=(), window=6, global_blocks=(1,))
        features, (found,) = model.forward_intermediates(x, indices=[1], norm=True, output_fmt="NLC")
        torch.testing.assert_close(features[:, model.num_prefix_tokens :], found)
        assert not torch.allclose(model(x), wanted)
        terrazzo.reduce(model, r=8, blocks=(0,), window=6, global_blocks=(1,))
        assert model(x).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mctf_deit_tiny", {"window": 0, "r": 0, "blocks": ()}, "window must be at least 1, got 0"),
        ("mctf_deit_tiny", {"window": 14}, r"blocks \[2, 5, 8, 11\] attend globally, so they cannot merge"),
        ("mctf_deit_tiny_fast", {"window": 14, "global_blocks": (12,)}, "global_blocks must be some of 0 to 11"),
        ("mctf_deit_tiny_fast", {"global_blocks": (2, 5)}, "and there is no window"),
        ("asvit_deit_tiny", {"window": 14}, "tokens are dropped by class attention over the whole image"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(InputError, match=message):
        timm.create_model(name, device="meta", **options)


def test_without_windows_there_is_none():
    assert type(_windows.within(Reducer(), None, 12, None)) is Reducer
