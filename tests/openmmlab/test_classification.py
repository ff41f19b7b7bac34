"""The classifier, its data and its metric."""

import pytest
import torch
from torch.nn import functional as F

from terrazzo.errors import InputError
from terrazzo.openmmlab import ClassificationAccuracy, Classifier, ImageFolderDataset

NAMES = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial")


def small(**kwargs):
    return Classifier({"name": "resnet18", "num_classes": 5}, **kwargs)


def test_modes():
    model = small().eval()
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([1, 4])
    logits = model(images)
    assert logits.shape == (2, 5)
    samples = model(list(images), targets, mode="predict")
    torch.testing.assert_close(torch.stack([sample["scores"] for sample in samples]), logits.softmax(1))
    assert [sample["gt_label"] for sample in samples] == [1, 4]
    assert [sample["pred_label"] for sample in samples] == logits.argmax(1).tolist()
    assert "gt_label" not in model(images, mode="predict")[0]
    smoothed = 0.9 * F.cross_entropy(logits, targets) - 0.1 * logits.log_softmax(1).mean()
    torch.testing.assert_close(model(images, targets, mode="loss")["loss"], smoothed)


def test_plain_loss():
    model = small(loss={"type": "CrossEntropyLoss"}).eval()
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([1, 4])
    torch.testing.assert_close(model(images, targets, mode="loss")["loss"], F.cross_entropy(model(images), targets))


def test_mixup_needs_pairs():
    model = small(mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0})
    loss = model(torch.rand(2, 3, 64, 64), torch.tensor([1, 4]), mode="loss")["loss"]
    assert torch.isfinite(loss)
    with pytest.raises(InputError, match="this batch has 3"):
        model(torch.rand(3, 3, 64, 64), torch.tensor([1, 4, 0]), mode="loss")


def test_checkpoint_with_other_classes(tmp_path):
    source = small()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "source.pth")
    model = Classifier({"name": "resnet18", "num_classes": 9, "checkpoint": str(tmp_path / "source.pth")})
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)
    assert model.backbone.fc.weight.shape[0] == 9


def test_init_weights_leaves_the_weights_alone():
    model = small()
    before = model.backbone.fc.weight.clone()
    model.init_weights()
    assert torch.equal(model.backbone.fc.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": {"name": "resnet18"}}, "num_classes"),
        ({"backbone": {"name": "resnt18", "num_classes": 2}}, "resnet18"),
        ({"backbone": {"name": "resnet18", "num_classes": 2}, "loss": {"type": "Huh"}}, "CrossEntropyLoss"),
        (
            {
                "backbone": {"name": "resnet18", "num_classes": 2},
                "loss": {"type": "LabelSmoothingCrossEntropy"},
                "mixup": {"mixup_alpha": 1.0},
            },
            "SoftTargetCrossEntropy",
        ),
    ],
)
def test_errors_of_the_classifier(arguments, message):
    with pytest.raises(InputError, match=message):
        Classifier(**arguments)


def test_dataset(tiny_data):
    root = tiny_data("eurosat64")
    data = ImageFolderDataset(str(root), "train", {"input_size": 48, "is_training": True})
    assert len(data) == 10
    item = data[0]
    assert item["inputs"].shape == (3, 48, 48)
    assert item["targets"] == 0
    assert data.metainfo["classes"][:5] == NAMES


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "v0-mstd5"])
def test_strongest_augmentation_posterizes_to_black(tiny_data, policy):
    transform = {"input_size": 48, "is_training": True, "auto_augment": policy}
    data = ImageFolderDataset(str(tiny_data("eurosat64")), "train", transform)
    assert all(data[index % 10]["inputs"].isfinite().all() for index in range(200))


def test_errors_of_the_dataset(tiny_data, tmp_path):
    with pytest.raises(InputError, match=r"none.* does not exist"):
        ImageFolderDataset(str(tmp_path / "none"), "train", {"input_size": 48})
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="does not have one folder of images per class"):
        ImageFolderDataset(str(tmp_path), "train", {"input_size": 48})
    with pytest.raises(InputError, match="the config says Forest"):
        ImageFolderDataset(str(tiny_data("eurosat64")), "val", {"input_size": 48}, {"classes": ("Forest",)})


def measured(scores, targets):
    metric = ClassificationAccuracy()
    metric.process({}, [{"scores": row, "gt_label": target} for row, target in zip(scores, targets)])
    return metric.evaluate(len(targets))


def test_accuracy_by_hand_with_an_absent_class():
    scores = torch.eye(6)[[0, 0, 0, 1, 5]] + 0.01 * torch.arange(6)
    targets = [0, 0, 1, 1, 2]  # classes 3 to 5 are absent, and 5 is predicted once
    metrics = measured(scores, targets)
    assert metrics["accuracy/top1"] == pytest.approx(60)
    assert metrics["accuracy/mean_class"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert metrics["accuracy/top5"] == pytest.approx(80)  # only the third image's target is not in the top 5


def test_top5_needs_more_than_five_classes():
    assert "accuracy/top5" not in measured(torch.eye(5), list(range(5)))
