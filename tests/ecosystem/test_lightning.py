"""Lightning with torchmetrics: a classifier that is trained, tested and restored from its checkpoint."""

import pytest
import timm
import torch
from support.seeded import image
from torch.utils.data import DataLoader, TensorDataset

import terrazzo  # noqa: F401

lightning = pytest.importorskip("lightning", reason="needs the extra 'ecosystem'")
torchmetrics = pytest.importorskip("torchmetrics", reason="needs the extra 'ecosystem'")
pytestmark = pytest.mark.slow


class Classifier(lightning.LightningModule):
    def __init__(self, name: str, num_classes: int):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, num_classes=num_classes)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=num_classes)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", ["s2aformer_mini", "dinat_mini", "roma_tiny"])
def test_fits_tests_and_restores(name, tmp_path):
    torch.manual_seed(0)
    module, x = Classifier(name, 2), image((48, 64), batch=4)
    before = [p.detach().clone() for p in module.model.parameters()]
    data = DataLoader(TensorDataset(x, torch.tensor([0, 1, 0, 1])), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert sum(not torch.equal(a, b) for a, b in zip(before, module.model.parameters())) == len(before)
    (results,) = trainer.test(module, data, verbose=False)
    assert 0 <= results["accuracy"] <= 1
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu").eval()
    with torch.no_grad():
        assert torch.equal(again(x), module.eval()(x))
