"""fastai's vision_learner, which cuts a timm model's head off and pools B C H W maps itself."""

import numpy as np
import pytest
import torch
from PIL import Image

import terrazzo  # noqa: F401

pytest.importorskip("fastai", reason="needs the extra 'ecosystem'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """Eight pictures of two classes."""
    from fastai.vision.all import ImageDataLoaders, Resize

    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(8):
        kind = folder / ("dark", "light")[number % 2]
        kind.mkdir(exist_ok=True)
        pixels = random.integers(0, 128, (64, 64, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(kind / f"{number}.png")
    return ImageDataLoaders.from_folder(
        folder, valid_pct=0.25, seed=0, item_tfms=Resize(64), bs=3, num_workers=0, device=torch.device("cpu")
    )


@pytest.mark.parametrize(("name", "options"), [("fmvit_tiny", {}), ("dinat_mini", {"output_fmt": "NCHW"})])
def test_fits_and_reloads(name, options, loaders, tmp_path):
    from fastai.vision.all import accuracy, load_learner, vision_learner

    torch.manual_seed(0)
    learner = vision_learner(loaders, name, pretrained=False, metrics=accuracy, path=tmp_path, **options)
    body = learner.model[0].model
    before = [p.detach().clone() for p in body.parameters()]
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 1e-3)
    changed = sum(not torch.equal(a, b) for a, b in zip(before, body.parameters()))
    assert changed > 0.9 * len(before)
    x = torch.rand(1, 3, 64, 64)
    learner.export("learner.pkl")
    again = load_learner(tmp_path / "learner.pkl")
    with torch.no_grad():
        assert torch.equal(again.model.eval()(x), learner.model.eval()(x))
