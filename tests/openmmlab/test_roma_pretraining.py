"""RoMA's pretraining: sizes, the tokens that a prediction sees, the losses, and a run from a config to a probe."""

import math

import pytest
import torch
from mmengine.registry import MODELS

from terrazzo.errors import InputError
from terrazzo.openmmlab import Classifier, RoMAPretraining, RotatedImages
from terrazzo.openmmlab.config import build_runner, load_config
from terrazzo.openmmlab.roma_pretraining import in_clusters, sines

BACKBONE = dict(name="roma_tiny", img_size=64, patch_size=8, embed_dim=32, depth=6)
# The parameters of the authors' pretraining models at 192 pixels, with their fixed position embeddings.
OFFICIAL = {
    "roma_tiny": (192, 19_906_688),
    "roma_small": (384, 36_571_136),
    "roma_base": (768, 99_428_096),
    "roma_large": (1024, 303_943_904),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = RoMAPretraining(BACKBONE, cluster=2, block=4, decoder_dim=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameters(name):
    width, wanted = OFFICIAL[name]
    with torch.device("meta"):
        model = RoMAPretraining(dict(name=name, img_size=192, embed_dim=width))
    found = sum(p.numel() for p in model.parameters())
    assert found + model.backbone.stem.pos_embed.numel() + 144 * 512 == wanted
    depth = len(model.backbone.blocks)
    assert [tap + 1 for tap in model.taps] == {12: [6, 8, 10, 12], 24: [12, 16, 20, 24]}[depth]
    assert tuple(model.mask.shape) == (128, 128)


def test_order_of_clusters():
    order = in_clusters(torch.arange(144).view(1, 12, 12, 1), 4)[0, :, 0].tolist()
    assert order[:16] == [row * 12 + column for row in range(4) for column in range(4)]
    assert (order[16], order[48]) == (4, 48)
    assert sorted(order) == list(range(144))


def test_sines():
    """The first half of the channels encodes the column, the second half the row; half of each is cosines."""
    table = sines(5, 16)[0]
    assert all(torch.equal(table[0, :, :8], table[row, :, :8]) for row in range(5))
    assert all(torch.equal(table[:, 0, 8:], table[:, column, 8:]) for column in range(5))
    wanted = [math.sin(3), math.cos(3), math.sin(2), math.cos(2)]
    assert table[2, 3, ::4].tolist() == pytest.approx(wanted)


def test_what_sees_what(model):
    """The prediction of a cluster depends on all earlier clusters, and not on this or later clusters."""
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    for segment in (0, 6, 14):  # predicts cluster segment + 1 of 16
        (grad,) = torch.autograd.grad(model(x)[0, 4 * segment : 4 * segment + 4].sum(), x)
        reached = grad.abs().sum(1).unflatten(2, (4, 16)).unflatten(1, (4, 16)).sum((2, 4)).flatten() > 0
        assert reached.tolist() == [True] * (segment + 1) + [False] * (15 - segment)


def test_targets_are_pixels_of_the_same_place(model):
    """A target is a patch by row, column and channel, normalised with the unbiased variance; cluster 0 is left out."""
    x = torch.randn(1, 3, 64, 64)
    found = in_clusters(model._normalised_patches(x), 2)[0, 4:]
    patch = x[0, :, 8:16, 24:32].permute(1, 2, 0).flatten()  # row 1, column 3: the last token of the second cluster
    torch.testing.assert_close(found[3], (patch - patch.mean()) / (patch.var() + 1e-6).sqrt())


def test_losses_by_hand(model):
    """Losses are errors on the grid of tokens; the coarser scale leaves out the upper left of its four blocks."""
    torch.manual_seed(1)
    x, original, window = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64), torch.tensor([[0, 1, 4], [3, 3, 2]])
    with torch.no_grad():
        losses, predicted = model(x, original, window, mode="loss"), model(x, window=window)
    order = in_clusters(torch.arange(64).view(1, 8, 8, 1), 2)[0, :, 0]
    grid = torch.zeros(2, 64, 192)
    grid[:, order[4:]] = predicted
    error = (grid.view(2, 8, 8, 192) - model._normalised_patches(original)).square()
    known = torch.ones(8, 8, dtype=torch.bool)
    known[:2, :2] = False
    torch.testing.assert_close(losses["loss_tokens"], error[:, known].mean())
    blocks = torch.stack([error[:, :4, 4:], error[:, 4:, :4], error[:, 4:, 4:]])
    torch.testing.assert_close(losses["loss_blocks"], 0.1 * blocks.mean())


def test_the_windows_tokens_are_marked(model):
    """All tokens of the window are marked, and no other token."""
    inputs = []
    model.backbone.blocks[0].register_forward_hook(lambda module, given, out: inputs.append(given[0]))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
        model(x, window=torch.tensor([[1, 2, 3], [0, 0, 2]]))
    marked = torch.zeros(2, 8, 8, 1, dtype=torch.bool)
    marked[0, 1:4, 2:5] = marked[1, :2, :2] = True
    wanted = in_clusters(marked, 2)[:, :-4] * model.angle_embed
    torch.testing.assert_close(inputs[1] - inputs[0], wanted.detach(), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns(model):
    model.train()
    losses = model(torch.randn(2, 3, 64, 64), window=torch.tensor([[1, 2, 3], [0, 0, 2]]), mode="loss")
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(backbone=dict(name="resnet18")), "it must be a RoMA"),
        (dict(backbone=dict(BACKBONE, img_size=60)), "img_size 60 is 7.5 patches per side"),
        (dict(backbone=BACKBONE, cluster=3), "multiple of the cluster's 3"),
        (dict(backbone=BACKBONE, cluster=4, block=2), "cluster <= block < side"),
        (dict(backbone=dict(BACKBONE, depth=4), cluster=2, block=4), "depth must be a multiple of 6"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        RoMAPretraining(**arguments)


def test_images_of_another_size(model):
    with pytest.raises(InputError, match="the config's img_size is 64"):
        model(torch.zeros(1, 3, 32, 64))


def test_data(tiny_data):
    root = tiny_data("eurosat64")
    data = RotatedImages(str(root), "train", dict(input_size=64), dict(patch_size=8, windows=(32, 16)))
    assert len(data) == 10
    item = data[3]
    top, left, side = (8 * item["window"]).tolist()
    changed = (item["inputs"] != item["targets"]).any(0).nonzero()
    assert len(changed)
    assert (changed >= torch.tensor([top, left])).all()
    assert (changed < torch.tensor([top + side, left + side])).all()
    with pytest.raises(InputError, match="does not exist"):
        RotatedImages(str(root), "nothing", dict(input_size=64))


def test_full_size_config():
    cfg = load_config("roma-base_8xb128-400e_unlabelled-192x192", "/elsewhere")
    assert cfg.train_dataloader.dataset.data_root == "/elsewhere"
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == OFFICIAL["roma_base"][1] - 144 * (768 + 512)


@pytest.mark.long
def test_from_a_config_to_a_probe(tiny_data, tmp_path):
    """Pretraining runs an epoch without labels; a probe starts from its file, and only the last layer learns."""
    options = {"model.backbone.embed_dim": 32, "model.backbone.depth": 6, "train_dataloader.num_workers": 0}
    small = {"model.decoder_dim": 64, "train_dataloader.batch_size": 5, "train_cfg.max_epochs": 1}
    cfg = load_config("roma-tiny_1xb64-100e_eurosat64", tiny_data("eurosat64"), options | small)
    runner = build_runner(cfg, tmp_path / "pretraining", seed=0)
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    trained = runner.model.backbone.state_dict()

    checkpoint = tmp_path / "pretraining" / "epoch_1.pth"
    more = {"model.backbone.checkpoint": str(checkpoint), "train_dataloader.batch_size": 5, "train_cfg.max_epochs": 1}
    more |= {"val_dataloader.num_workers": 0}
    cfg = load_config("roma-tiny_1xb64-10e-probe_eurosat64", tiny_data("eurosat64"), options | more)
    runner = build_runner(cfg, tmp_path / "probe", seed=0)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    for i in range(4):
        for name in ("conv1d.weight", "A_log", "x_proj.weight"):
            found = before[f"backbone.blocks.5.mixer.scans.{i}.{name}"]
            assert torch.equal(found, trained[f"blocks.5.mixer.scans.0.{name}"])
    runner.train()
    after = runner.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.head.fc.weight", "backbone.head.fc.bias"}


def test_a_probe_evaluates_what_it_does_not_train():
    model = Classifier(dict(name="resnet18", num_classes=3), probe=True).train()
    before = model.backbone.bn1.running_mean.clone()
    model(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), mode="loss")["loss"].backward()
    assert torch.equal(model.backbone.bn1.running_mean, before)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "backbone.fc.weight",
        "backbone.fc.bias",
    }
