"""anomalib: a backbone by name, with the stages as layers."""

import pytest
import torch
from support.ecosystem import leaves, reloads, step
from support.seeded import image

import terrazzo  # noqa: F401

pytest.importorskip("anomalib", reason="needs the extra 'ecosystem'")
pytestmark = pytest.mark.slow

NAMES = ["s2aformer_mini", "dinat_mini", "attnet_xxs"]


@pytest.mark.parametrize("name", NAMES)
def test_extractor_steps_and_reloads(name, tmp_path):
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor

    def make():
        return TimmFeatureExtractor(name, layers=[0, 1, 2], pre_trained=False, requires_grad=True)

    model, x = make(), image((64, 96), batch=2)
    step(sum(y.square().mean() for y in leaves(model.train()(x))), model.feature_extractor)
    reloads(model, make, lambda model: model(x), tmp_path / "model.pth")


@pytest.mark.parametrize("name", NAMES)
def test_padim_finds_what_is_unusual(name, tmp_path):
    """PaDiM's distribution is part of the state dict, and the reloaded model finds the same scores."""
    from anomalib.models.image.padim.torch_model import PadimModel

    def make():
        torch.manual_seed(0)
        return PadimModel(name, layers=["stages.0", "stages.1"], pre_trained=False, n_features=20)

    torch.manual_seed(1)
    model, x = make().train(), 0.1 * image((64, 64), batch=8)
    model(x)
    model.fit()
    model.eval()
    unusual = x[:1].clone()
    unusual[:, :, 16:40, 16:40] += 3
    with torch.no_grad():
        scores = [model(y).pred_score.item() for y in (x[:1], unusual)]
    assert scores[1] > scores[0]
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = make().eval()
    again.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(again(unusual).anomaly_map, model(unusual).anomaly_map, rtol=1e-4, atol=1e-5)
