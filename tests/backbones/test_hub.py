"""timm's hub functions; a folder replaces the network."""

import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from support.families import smallest
from support.seeded import build, image
from timm.models import _hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder for each repository."""

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, filename, revision=None):
            return (tmp_path / repo_id / filename).exists()

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / repo_id)

    if not hasattr(_hub, "HfApi"):
        pytest.skip("this timm pushes by functions that this test does not replace")
    monkeypatch.setattr(_hub, "HfApi", Api)
    monkeypatch.setattr(_hub, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / repo_id / filename))
    return tmp_path


@pytest.mark.parametrize("name", [*smallest(), "asvit_lvvit_small"])
def test_pushed_and_fetched(name, hub):
    model = build(name, num_classes=5)
    timm.models.push_to_hf_hub(model, f"somebody/{name}", model_card=dict(description="Of tiles."))
    files = {path.name for path in (hub / "somebody" / name).iterdir()}
    assert files == {"config.json", "model.safetensors", "pytorch_model.bin", "README.md"}
    assert "Of tiles." in (hub / "somebody" / name / "README.md").read_text()
    again = timm.create_model(f"hf-hub:somebody/{name}", pretrained=True).eval()
    assert torch.equal(again(image((64, 64))), model(image((64, 64))))
