"""Detections are compared by matched boxes, not by rows."""

import pytest
import torch

from terrazzo.tools.export.parity import compare

NAMES = ("boxes", "scores", "labels", "masks")


def detections(count=60):
    """Random boxes, scores, labels and masks, best first."""
    random = torch.Generator().manual_seed(0)
    corners = 50 * torch.rand(count, 2, generator=random)
    boxes = torch.cat([corners, corners + 10 + 30 * torch.rand(count, 2, generator=random)], dim=1)
    scores = torch.rand(count, generator=random).sort(descending=True).values
    labels = torch.randint(0, 3, (count,), generator=random)
    masks = (torch.rand(count, 20, 24, generator=random) > 0.5).to(torch.uint8)
    return [boxes, scores, labels, masks]


def verdicts(mine, theirs):
    return {parity.output: parity for parity in compare(NAMES, "noise", mine, theirs)}


def test_order_and_noise_do_not_matter():
    mine = detections()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    theirs = [values[order] for values in mine]
    theirs[0], theirs[1] = theirs[0] + 1e-3, theirs[1] - 1e-5
    found = verdicts(mine, theirs)
    assert all(parity.passed and parity.compared for parity in found.values())
    assert "60 of 60 boxes" in str(found["boxes"])
    assert 0 < found["scores"].figure < 2e-5


def test_two_boxes_in_one_place_keep_their_labels():
    boxes, scores, labels, masks = detections(2)
    boxes[1], labels[:] = boxes[0], torch.tensor([0, 1])
    mine = [boxes, scores, labels, masks]
    found = verdicts(mine, [values.flip(0) for values in mine])
    assert all(parity.passed for parity in found.values())


def change(index, values):
    """A function that replaces the first row of the output at an index."""

    def changed(outputs):
        outputs[index] = outputs[index].clone()
        outputs[index][0] = values(outputs[index][0])

    return changed


def lose(outputs):
    outputs[:] = [values[1:] for values in outputs]


def invent(outputs):
    outputs[:] = [torch.cat([values, values[:1] + 60]) for values in outputs]


@pytest.mark.parametrize(
    ("spoil", "output"),
    [
        (change(0, lambda box: box + 1), "boxes"),
        (change(0, lambda box: box * float("nan")), "boxes"),
        (lose, "boxes"),
        (invent, "boxes"),
        (change(1, lambda score: score - 2e-3), "scores"),
        (change(1, lambda score: score * float("nan")), "scores"),
        (change(2, lambda label: label + 1), "labels"),
        (change(3, lambda mask: 1 - mask), "masks"),
    ],
)
def test_what_is_wrong_fails(spoil, output):
    mine = detections()
    theirs = list(mine)
    spoil(theirs)
    assert not verdicts(mine, theirs)[output].passed


@pytest.mark.parametrize(("wrong", "passes"), [(1, True), (2, False)])
def test_a_label_map_may_differ_in_one_element_of_a_thousand(wrong, passes):
    mine = torch.zeros(1, 1000, dtype=torch.long)
    theirs = mine.clone()
    theirs[0, :wrong] = 1
    (parity,) = compare(("labels",), "noise", [mine], [theirs])
    assert parity.passed is passes


def test_nothing_found_is_nothing_compared():
    nothing = [values[:0] for values in detections()]
    found = verdicts(nothing, nothing)
    assert all(parity.passed and not parity.compared for parity in found.values())
    assert "nothing to compare" in str(found["boxes"])
    assert not verdicts(detections(), nothing)["boxes"].passed
    assert not verdicts(nothing, detections())["boxes"].passed


def test_empty_boxes_match():
    mine = detections(4)
    mine[0][:2] = 0
    assert all(parity.passed for parity in verdicts(mine, mine).values())
