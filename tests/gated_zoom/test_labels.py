"""What the heads learn: hand-made cases, and that the region head can learn it."""

import pytest
import torch
import torch.nn.functional as F

from terrazzo.gated_zoom import Gate, Grid, RegionHead
from terrazzo.gated_zoom._labels import captured, classes_of, disagreement, gain, needs

GRID = Grid(4, 8, 4, 0)


def logits_of(labels, classes=3, sure=4.0):
    return sure * F.one_hot(labels, classes).permute(0, 3, 1, 2).float()


@pytest.fixture
def passes():
    """Two tiles: the fine pass changes 4 of 16 pixels of the first, and none of the second; and the truth.

    Of the changes, 3 are right, one is a mistake; one more pixel is wrong in both passes.
    """
    coarse = torch.zeros(1, 4, 8, dtype=torch.long)
    fine, truth = coarse.clone(), coarse.clone()
    fine[0, 0, :4] = 1
    truth[0, 0, :3] = 1
    truth[0, 3, 7] = 2
    return logits_of(coarse), logits_of(fine), truth


def test_disagreement(passes):
    coarse, fine, _ = passes
    sure = float(torch.tensor([4.0, 0, 0]).softmax(0)[0])
    torch.testing.assert_close(disagreement(coarse, fine, GRID), torch.tensor([[[4 / 16 * sure, 0]]]))
    assert torch.equal(classes_of(torch.tensor([[[[-1.0, 2.0]]]])), torch.tensor([[[0, 1]]]))  # one channel


def test_the_threshold_of_a_single_channel():
    """As mmsegmentation predicts: foreground from a probability of .3 on, so .2 -> .4 is a change, .4 -> .6 is none."""
    coarse, fine = (torch.tensor(p).logit().expand(1, 1, 4, 4).repeat(1, 1, 1, 2) for p in (0.2, 0.6))
    coarse[..., 4:] = torch.tensor(0.4).logit()
    assert classes_of(coarse, 0.3)[0, 0].tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(disagreement(coarse, fine, GRID, 0.3), torch.tensor([[[0.6, 0]]]))
    truth = torch.ones(1, 4, 8, dtype=torch.long)
    assert gain(coarse, fine, truth, GRID, threshold=0.3).tolist() == [[[1, 0]]]


def test_gain(passes):
    coarse, fine, truth = passes
    torch.testing.assert_close(gain(coarse, fine, truth, GRID), torch.tensor([[[2 / 16, 0]]]))
    torch.testing.assert_close(gain(fine, coarse, truth, GRID), torch.zeros(1, 1, 2))  # never below 0
    truth[0, 0, 0] = 255
    torch.testing.assert_close(gain(coarse, fine, truth, GRID), torch.tensor([[[1 / 16, 0]]]))


@pytest.mark.parametrize(
    ("wrong", "answers"),
    [
        ((0, 0, 0, 0), [False, False, False, False]),
        ((0, 2, 10, 40), [False, False, True, True]),
        ((0, 3, 3, 3), [False, True, True, True]),
        ((0, 8, 10, 40), None),  # the two finest disagree
        ((0, 1, 30, 1), None),  # not monotone
    ],
)
def test_needs(wrong, answers):
    """Of 100 pixels, this many differ from the finest scale."""
    maps = [torch.arange(100).view(10, 10) >= 100 - count for count in wrong]
    assert needs([labels.long() for labels in maps], eps=0.02, agreed=0.95) == answers


def test_captured():
    scores, targets = torch.tensor([[0.1, 0.9, 0.5, 0.2]]), torch.tensor([[1.0, 2.0, 0.0, 5.0]])
    assert [float(captured(scores, targets, tiles)[0]) for tiles in (1, 2, 3)] == [0.25, 0.25, 0.875]


@pytest.mark.long
def test_heads_learn():
    """From features of which one channel marks busy tiles: the order of tiles, and which pictures have a busy tile."""
    torch.manual_seed(0)
    grid, busy = Grid(64, 96, 16, 0), torch.rand(24, 4, 6) * (torch.arange(24) % 2)[:, None, None]
    features = torch.randn(24, 6, 16, 24)
    features[:, 2] += 4 * busy.repeat_interleave(4, 1).repeat_interleave(4, 2)
    features.requires_grad_(True)
    region, gate = RegionHead(6), Gate(6)
    optimizer = torch.optim.AdamW([*region.parameters(), *gate.parameters()], lr=0.02)
    wanted = (torch.arange(24) % 2).float()
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(region(features, grid), busy)
        (loss + F.binary_cross_entropy_with_logits(gate(features), wanted)).backward()
        optimizer.step()
    assert features.grad is None  # the base model is not trained
    found = region(features, grid).detach()[1::2].flatten()
    ranks = torch.stack([found, busy[1::2].flatten()]).argsort(1).argsort(1).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    assert ((gate(features) > 0) == wanted.bool()).all()
