"""A segmentation head's losses and accuracy over virtual ranks: the shares add up to the losses of one process."""

import copy

import pytest
import torch
from support.shared_rows import assert_same, on_ranks
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._parallelize import replace

pytest.importorskip("terrazzo.openmmlab", reason="needs the extra 'openmmlab'")
pytest.importorskip("mmseg", reason="needs the extra 'openmmlab'")

CLASSES = 3
LOSSES = {
    "mean over all pixels": dict(),
    "mean over valid pixels": dict(avg_non_ignore=True),
    "class weights": dict(class_weight=[0.5, 2.0, 1.0], avg_non_ignore=True, valid=True),
    "class weights of all pixels": dict(class_weight=[0.5, 2.0, 1.0], loss_weight=0.4, valid=True),
    "sum": dict(reduction="sum"),
    "sigmoid": dict(use_sigmoid=True),
    "sigmoid over valid pixels": dict(use_sigmoid=True, avg_non_ignore=True),
    "one channel": dict(use_sigmoid=True, avg_non_ignore=True, classes=2, out_channels=1),
}


def head_of(options: dict, **more) -> nn.Module:
    from mmseg.models.decode_heads import FCNHead

    options = dict(options)
    options.pop("valid", None)
    shape = dict(num_classes=options.pop("classes", CLASSES), out_channels=options.pop("out_channels", None))
    torch.manual_seed(0)
    loss = dict(type="CrossEntropyLoss", **options)
    head = FCNHead(num_convs=1, in_channels=4, channels=4, norm_cfg=dict(type="BN"), loss_decode=loss, **shape, **more)
    head.conv_seg.reset_parameters()
    return head.double()


def samples_of(label: torch.Tensor) -> list:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    return [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in label]


def labels(options: dict, height: int, width: int) -> torch.Tensor:
    """Labels of which the upper half is ignored, where the loss takes ignored pixels: a rank may have no other."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(options.get("classes", CLASSES), (2, 1, height, width), generator=generator)
    if not options.get("valid"):
        label[:, :, : height // 2] = 255
    return label


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("size", [(24, 10, 2, 4), (30, 9, 3, 4)], ids=str)
def test_shares_add_up(options, size):
    height, width, ranks, stride = size
    head = head_of(options, dropout_ratio=0)
    shared = copy.deepcopy(head)
    replace(shared, False)
    features = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = labels(options, height, width)
    wanted = head.loss([features], samples_of(label), None)

    def of_rank(part, x):
        start, end = part.image.rows[part.rank]
        losses = shared.loss([x], samples_of(label[:, :, start:end]), None)
        return torch.stack([value.sum() for value in losses.values()]).double()

    found = _sum(on_ranks(of_rank, features, ranks, stride, dim=-1), ranks)
    # mmsegmentation counts in float32, and makes labels for a sigmoid in float32.
    tolerances = {"loss_ce": 1e-6 if options.get("use_sigmoid") else 1e-10, "acc_seg": 1e-5}
    for value, (name, want) in zip(found, wanted.items()):
        assert_same(value, want.sum().double(), name, tolerances[name])
    found[0].backward()
    wanted["loss_ce"].backward()
    for (name, parameter), other in zip(head.named_parameters(), shared.parameters()):
        assert_same(other.grad, parameter.grad, f"gradients of {name}", tolerances["loss_ce"])


def _sum(joined: torch.Tensor, ranks: int) -> torch.Tensor:
    return joined.view(ranks, -1).sum(0)


def test_a_loss_of_one_ranks_pixels_alone_would_be_found(monkeypatch):
    from terrazzo.spatial.entries import mmseg_cross_entropy_loss as module

    monkeypatch.setattr(module, "_divisor", lambda part, loss, score, label, valid: int(valid.sum()))
    with pytest.raises(AssertionError, match="loss_ce differ"):
        test_shares_add_up(LOSSES["mean over valid pixels"], (30, 9, 3, 4))


def test_losses_that_are_no_mean_over_pixels_are_refused():
    from mmseg.models.losses import DiceLoss

    head = head_of({})
    head.loss_decode = DiceLoss()
    replace(head, False)
    features, label = torch.zeros(1, 4, 8, 8, dtype=torch.float64), torch.zeros(1, 1, 4, 8, dtype=torch.long)
    with pytest.raises(InputError, match="loss_decode is a DiceLoss of one rank's pixels"):
        on_ranks(lambda part, x: head.loss([x], samples_of(label), None)["loss_dice"], features, 2, 4, dim=0)


def test_dropout_leaves_the_ranks_random_numbers_equal():
    """Ranks have 8 and 4 rows, and draw the same number afterwards; each drops pixels of its own."""
    model = nn.Dropout(0.5)
    replace(model, False)
    states = []

    def of_rank(part, x):
        torch.manual_seed(3)
        y = model(x)
        states.append(torch.rand(()).item())
        return y

    y = on_ranks(of_rank, torch.ones(1, 4, 12, 64), 2, 4)
    assert states[0] == states[1]
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (y == 0).float().mean() < 0.6
    assert not torch.equal(y[:, :, :4], y[:, :, 8:])
