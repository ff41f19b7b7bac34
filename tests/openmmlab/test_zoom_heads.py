"""Training the heads of a zoom from the packaged configs: region head, gate, refinement, on tiny data."""

import math

import pytest
import torch
from mmengine.registry import MODELS

import terrazzo
from terrazzo.errors import InputError
from terrazzo.gated_zoom import load_heads
from terrazzo.gated_zoom._fusion import enlarged
from terrazzo.openmmlab import ZoomHeads, ZoomQuality
from terrazzo.openmmlab.config import build_runner, load_config, packaged_configs
from terrazzo.openmmlab.zoom_heads import gate_threshold

CONFIGS = [name for name, path in packaged_configs().items() if path.parent.name == "zoom"]
REGION, GATE = (f"zoom-{stage}_fpn-attnet-xxs_1xb2-600_camvid-480x360" for stage in ("region", "gate"))
REFINE = "zoom-refine_fpn-attnet-xxs_1xb2-147_camvid-480x360"
BACKBONE = {"name": "resnet10t", "out_indices": (1, 2, 3, 4)}
TINY = {"tile": 32, "halo": 16, "budget": 0.5}


def tiny(name, root, **options):
    """A config on two pictures of 96 x 64, for three iterations."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    small = {f"{loader}.num_workers": 0 for loader in loaders} | {"train_cfg.max_iters": 3, "train_cfg.val_interval": 3}
    small |= {f"model.base.backbone.{key}": value for key, value in BACKBONE.items()}
    small |= {"model.base.neck.in_channels": [64, 128, 256, 512], "optim_wrapper.optimizer.lr": 0.01}
    small |= {f"model.{key}": value for key, value in TINY.items()}
    cfg = load_config(name, root, small | options)
    for loader in loaders:
        for step in cfg[loader].dataset.pipeline:
            if step.type == "Resize":
                step.scale = (96, 64)
    return cfg


@pytest.fixture(scope="module")
def base(tiny_data, tmp_path_factory):
    """The tiny data, and random weights of the base model."""
    root, file = tiny_data("camvid"), tmp_path_factory.mktemp("base") / "base.pth"
    torch.manual_seed(0)
    model = MODELS.build(tiny(REGION, root).model.base)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, file)
    return root, str(file)


@pytest.mark.long
def test_region_head_then_gate(base, tmp_path):
    root, file = base
    for labels in ("annotation", "agreement"):
        cfg = tiny(REGION, root, **{"model.checkpoint": file, "model.labels": labels})
        runner = build_runner(cfg, tmp_path / labels, seed=0)
        before = {name: value.clone() for name, value in runner.model.heads.state_dict().items()}
        runner.train()
        assert math.isfinite(runner.message_hub.get_scalar("train/loss_region").current())
    zoom = runner.model.zoom
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in zoom.passes.model.state_dict().items())
    assert all(name.startswith("heads.") for name in runner.model.state_dict())
    logged = {name.removeprefix("val/zoom/"): value for name, value in runner.message_hub.log_scalars.items()}
    assert {"spearman", "captured", "captured_untrained", "captured_random", "region_threshold"} <= set(logged)
    heads = load_heads(tmp_path / "agreement" / "heads.pth")
    assert heads.trained.tolist() == [True, False, False]
    assert float(heads.thresholds[0]) == pytest.approx(logged["region_threshold"].current())
    assert not torch.equal(heads.region.score.weight, before["region.score.weight"])
    assert torch.equal(heads.gate.score.weight, before["gate.score.weight"])

    cfg = tiny(GATE, root, **{"model.checkpoint": file, "load_from": str(tmp_path / "agreement" / "heads.pth")})
    cfg.model.eps = 0.2
    runner = build_runner(cfg, tmp_path / "gate", seed=0)
    runner.train()
    both = load_heads(tmp_path / "gate" / "heads.pth")
    assert torch.equal(both.region.score.weight, heads.region.score.weight)
    assert both.trained.tolist() == [True, True, False]
    zoomed = terrazzo.zoom(
        zoom.passes.model, tile=32, halo=16, stride=16, heads=tmp_path / "gate" / "heads.pth", gate=0, budget=0.5
    )
    look = zoomed.look(torch.randn(1, 3, 64, 96))
    assert zoomed.score == "region"
    assert look.result.shape == (1, 11, 64, 96)
    assert len(look.tiles[0]) == 3


@pytest.mark.long
def test_refinement(base, tmp_path):
    """Its training changes the refinement alone and lowers the loss; the zoom uses it where tiles lie."""
    root, file = base
    cfg = tiny(REFINE, root, **{"model.checkpoint": file, "train_cfg.max_iters": 6, "load_from": None})
    cfg.optim_wrapper.optimizer.lr = 0.002
    runner = build_runner(cfg, tmp_path, seed=0)
    before = {name: value.clone() for name, value in runner.model.heads.state_dict().items()}
    runner.train()
    losses = runner.message_hub.get_scalar("train/loss_refine").data[0]
    assert losses[-1] < losses[0]
    heads = load_heads(tmp_path / "heads.pth")
    assert heads.trained.tolist() == [False, False, True]
    changed = {name for name, value in heads.state_dict().items() if not torch.equal(value, before[name])}
    assert changed - {"thresholds", "trained"} == {"refine.mix.weight", "refine.mix.bias"}
    logged = {name.removeprefix("val/zoom/"): value for name, value in runner.message_hub.log_scalars.items()}
    assert 0 <= logged["miou_plain"].current() <= 100
    assert 0 <= logged["miou_refined"].current() <= 100

    options = dict(tile=32, halo=16, stride=16, heads=heads, budget=0.5)
    model, images = runner.model.zoom.passes.model, torch.randn(1, 3, 64, 96)
    plain, refined = (terrazzo.zoom(model, refine=refine, **options).look(images) for refine in (False, True))
    inner = plain.grid.inner(plain.tiles[0][0])
    assert plain.tiles == refined.tiles
    assert (plain.result != refined.result)[(..., *inner.slices)].any()
    spared = terrazzo.zoom(model, refine=True, **(options | dict(budget=0))).look(images)
    assert torch.equal(spared.result, enlarged(spared.coarse.result, (64, 96)))


def test_quality_of_a_refinement():
    """Two classes and four pixels: one error is an IoU of 2/3 and 1/2."""
    plain, refined = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[2, 0], [0, 2]])
    found = ZoomQuality().compute_metrics([dict(plain=plain, refined=refined)] * 2)
    assert found == {"miou_plain": pytest.approx(100 * (2 / 3 + 1 / 2) / 2), "miou_refined": 100}


def test_gate_learns_from_consistent_pictures_alone(base, monkeypatch):
    """Inconsistent pictures do not count, and pictures in need count as much as all others together."""
    root, file = base
    model = MODELS.build(tiny(GATE, root, **{"model.checkpoint": file}).model)
    answers = [True, False, None, False, False]
    monkeypatch.setattr(ZoomHeads, "_needs", lambda self, inputs, coarse: answers[: len(inputs)])
    images = torch.randn(5, 3, 64, 96)
    loss = model(images, mode="loss")["loss_gate"]
    p = model(images, mode="tensor").sigmoid()
    expected = -(4 / 2 * p[0].log() + 4 / 6 * sum((1 - p[i]).log() for i in (1, 3, 4))) / 4
    torch.testing.assert_close(loss, expected)
    answers[:] = [None] * 5
    assert model(images, mode="loss")["loss_gate"] == 0


@torch.no_grad()
def test_gate_looks_once_at_each_scale(base):
    root, file = base
    model = MODELS.build(tiny(GATE, root, **{"model.checkpoint": file}).model)
    widths = []
    model.zoom.passes.model.backbone.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[3]))
    model(torch.randn(1, 3, 64, 96), mode="predict")
    assert sorted(widths) == [12, 24, 48, 96]


FAST = ("zoom-base_fpn-attnet-xxs_1xb4-10k_camvid-480x360", GATE, REFINE)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in CONFIGS])
def test_configs_build(name, tmp_path):
    cfg = load_config(name)
    segmentor = cfg.model if name.startswith("zoom-base") else cfg.model.base
    model = MODELS.build(segmentor)
    assert list(segmentor.neck.in_channels) == model.backbone.out_channels
    if name.startswith("zoom-base"):
        return
    torch.save({"state_dict": model.state_dict()}, tmp_path / "base.pth")
    heads = MODELS.build(dict(cfg.model, checkpoint=str(tmp_path / "base.pth")))
    trained = {name for name, value in heads.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in heads.named_parameters() if name.startswith(f"heads.{cfg.model.stage}.")}
    assert sum(value.numel() for value in heads.parameters()) < 50_000


def test_quality_of_scores():
    """Two pictures with four tiles each, of which one may be chosen."""
    targets = torch.tensor([[0.0, 0.4, 0.2, 0.0], [0.1, 0.1, 0.1, 0.9]])
    scores = torch.tensor([[0.1, 0.7, 0.3, 0.2], [0.2, 0.9, 0.1, 0.3]])
    results = [dict(scores=s, untrained=-s, targets=t, tiles=1) for s, t in zip(scores, targets)]
    found = ZoomQuality().compute_metrics(results)
    assert found["captured"] == pytest.approx(100 * (0.4 + 0.1) / 1.8)
    assert found["captured_untrained"] == pytest.approx(100 * (0.0 + 0.1) / 1.8)
    assert found["captured_random"] == pytest.approx(25)
    assert (scores > found["region_threshold"]).sum() == 2  # the budget's share of all tiles
    assert -1 <= found["spearman"] <= 1
    results = [
        dict(gate=p, need=need) for p, need in [(0.1, False), (0.3, False), (0.2, True), (0.8, True), (0.5, None)]
    ]
    found = ZoomQuality().compute_metrics(results)
    assert found["gate_threshold"] == pytest.approx(0.2)
    assert found["easy_spared"] == 50
    assert found["needed_spared"] == 0
    assert found["dropped"] == 20
    assert gate_threshold(torch.tensor([]), torch.tensor([0.4])) == 0
    assert gate_threshold(torch.tensor([0.4]), torch.tensor([])) == 0.5
    assert gate_threshold(torch.tensor([0.4]), torch.linspace(0, 1, 101)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model.checkpoint": None}, "name the file of its training"),
        ({"model.stage": "both"}, "stage is 'both'; choose region or gate or refine"),
        ({"model.labels": "none"}, "labels is 'none'; choose agreement or annotation"),
        ({"model.tile": 100}, "multiple of the model's stride"),
    ],
)
def test_refusals(base, options, text):
    root, file = base
    with pytest.raises(InputError, match=text):
        MODELS.build(tiny(REGION, root, **{"model.checkpoint": file, **options}).model)
