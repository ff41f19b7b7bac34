"""The axial layer against the official code's packs, its cost, and its ONNX file."""

import re

import pytest
import torch
from support.golden_packs import ROOT, Pack
from support.mixer_contract import MixerPack, packs
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.clips import AxialTrajectoryEncoder, AxialTrajectoryLayer, positions_3d
from terrazzo.errors import InputError

PACKS = [name for name in packs("axial_trajectory") if name.startswith("layer_")]


@pytest.mark.parametrize("name", PACKS)
def test_golden(name):
    pack = MixerPack("axial_trajectory", name)
    layer = AxialTrajectoryLayer(16, pack.meta["ffn"], pack.meta["heads"], dtype=torch.float64)
    layer.load_state_dict({key.removeprefix("w."): pack[key] for key in pack.arrays if key.startswith("w.")})
    x = pack["src"].requires_grad_()
    out = layer(x, pack["pos"])
    torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
    (out * pack["grad"]).sum().backward()
    torch.testing.assert_close(x.grad, pack["dsrc"], rtol=0, atol=1e-9)


def test_packs_are_there():
    assert len(PACKS) == 2


def test_parameters_and_names():
    with torch.device("meta"):
        layer = AxialTrajectoryEncoder().temporal_layers[0]
    assert sum(p.numel() for p in layer.parameters()) == 1_447_680
    own = {name.rsplit(".", 1)[0] for name in layer.state_dict()}
    parts = {
        f"{axis}_attn.{part}" for axis in ("height", "width") for part in ("q", "k", "v", "proj_q", "proj_kv", "proj")
    }
    assert own == parts | {"norm1", "norm2", "linear1", "linear2"}


def test_positions():
    pack = Pack(ROOT / "axialvs" / "pos3d_T3_4x5.npz")
    meta = pack.meta
    found = positions_3d(meta["frames"], meta["height"], meta["width"], 2 * meta["num_feats"], dtype=torch.float64)
    torch.testing.assert_close(found[None], torch.from_numpy(pack.arrays["out"]), rtol=0, atol=1e-9)


@torch.no_grad()
def test_clips_of_a_batch_are_apart():
    layer = AxialTrajectoryLayer(16, 32, 4, dtype=torch.float64)
    x, position = torch.randn(6, 20, 16, dtype=torch.float64), positions_3d(3, 4, 5, 16, dtype=torch.float64)[None]
    torch.testing.assert_close(layer(x, position), torch.cat([layer(part, position) for part in x.split(3)]))


@torch.no_grad()
def test_cost():
    """Twice as many rows and columns cost 8 times as many products of tokens, and 4 times as many projections."""

    def flops(side):
        with torch.device("meta"):
            layer, x = AxialTrajectoryLayer(16, 32, 4), torch.empty(2, side * side, 16)
            position = torch.empty(1, 2, side, side, 16)
        with FlopCounterMode(display=False) as counter:
            layer(x, position)
        return counter.get_total_flops()

    assert 4 * flops(8) < flops(16) < 8 * flops(8)


def test_gradients_reach_all_parameters():
    layer = AxialTrajectoryLayer(16, 32, 4)
    layer(torch.randn(6, 20, 16), positions_3d(3, 4, 5, 16)[None]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("maps", "position", "message"),
    [
        ((5, 20, 16), (1, 3, 4, 5, 16), "frames (3) must divide the maps (5)"),
        ((9, 20, 16), (2, 3, 4, 5, 16), "position must be of 1 clip or of all clips (3), got 2"),
        ((6, 21, 16), (1, 3, 4, 5, 16), "maps of positions 4x5x16 must be (B T, 20, 16), got (6, 21, 16)"),
        ((6, 20, 16), (1, 3, 4, 5, 8), "maps of positions 4x5x8 must be (B T, 20, 8), got (6, 20, 16)"),
    ],
)
def test_refused_shapes(maps, position, message):
    with pytest.raises(InputError, match=re.escape(message)):
        AxialTrajectoryLayer(16, 32, 4)(torch.zeros(maps), torch.zeros(position))


@pytest.mark.parametrize("dim", [0, 6])
def test_refused_channels_of_positions(dim):
    with pytest.raises(InputError, match=f"dim must be a multiple of 4, got {dim}"):
        positions_3d(3, 4, 5, dim)


@pytest.mark.long
@torch.no_grad()
def test_onnx(tmp_path):
    """ONNX Runtime agrees; the number of frames is a constant of the file, and the sizes of the maps are too."""
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    torch.manual_seed(0)
    layer, file = AxialTrajectoryLayer(16, 32, 4).eval(), tmp_path / "layer.onnx"
    given = torch.randn(6, 20, 16), positions_3d(3, 4, 5, 16)[None]
    torch.onnx.export(layer, given, file, dynamo=True, verbose=False, input_names=["x", "position"])
    session = runtime.InferenceSession(file)
    (found,) = session.run(None, {"x": given[0].numpy(), "position": given[1].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@torch.no_grad()
def test_autocast_and_compile():
    layer = AxialTrajectoryLayer(16, 32, 4).eval()
    given = torch.randn(6, 20, 16), positions_3d(3, 4, 5, 16)[None]
    wanted = layer(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(*given) - wanted).abs().max() < 0.1
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(*given), wanted)
