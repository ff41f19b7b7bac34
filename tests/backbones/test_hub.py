"""timm's hub functions; a folder replaces the network."""

import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from support.families import smallest
from support.seeded import build, image
from timm.models import _hub
from timm.models.vision_transformer import VisionTransformer

import terrazzo
from terrazzo.errors import InputError


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


FIRST, *OTHERS = smallest()


# The contract's test of the hub has a folder for every family; here only timm's two functions differ.
@pytest.mark.parametrize(
    "name", [FIRST, "asvit_lvvit_small", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_pushed_and_fetched(name, hub):
    model = build(name, num_classes=5)
    timm.models.push_to_hf_hub(model, f"somebody/{name}", model_card=dict(description="Of tiles."))
    files = {path.name for path in (hub / "somebody" / name).iterdir()}
    assert files == {"config.json", "model.safetensors", "pytorch_model.bin", "README.md"}
    assert "Of tiles." in (hub / "somebody" / name / "README.md").read_text()
    again = timm.create_model(f"hf-hub:somebody/{name}", pretrained=True).eval()
    assert torch.equal(again(image((64, 64))), model(image((64, 64))))


def vit(name="vit_tiny_patch16_224", **kwargs):
    return build(name, depth=4, num_classes=5, **{"dynamic_img_size": True, **kwargs})


CHANGED = {
    "merged": lambda: terrazzo.reduce(vit(), r=3, restore="soft", full_last=1),
    "dropped": lambda: terrazzo.reduce(vit(), method="asvit", blocks=(1, 2, 3), thresholds=(0.01, 0.02, 0.03)),
    "in windows": lambda: terrazzo.reduce(vit(global_pool="avg"), r=0.3, blocks=(1, 2), window=4, global_blocks=(3,)),
    "converted": lambda: terrazzo.convert_attention(vit(in_chans=1), "hedgehog", layers=[0, 2]),
    "two mixers": lambda: terrazzo.convert_attention(
        terrazzo.convert_attention(vit(), "na", layers=[0, 1], kernel=3, bias=True), "hedgehog", layers=[3]
    ),
    "both": lambda: terrazzo.reduce(terrazzo.convert_attention(vit(), "hedgehog", layers=[0]), r=2, blocks=(2, 3)),
    "rotary": lambda: terrazzo.reduce(vit("vit_small_patch16_dinov3"), r=2),
}


def randomised(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", CHANGED)
def test_changed_models_come_back(kind, safe, tmp_path):
    model = randomised(CHANGED[kind]())
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model)
    assert again.changes == model.changes
    x = image((64, 96), chans=model.in_chans)
    assert torch.equal(again(x), model(x))
    found, wanted = (m.forward_intermediates(x, intermediates_only=True) for m in (again, model))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    timm.models.save_for_hf(again, tmp_path / "again", safe_serialization=safe)
    config = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert config[0]["architecture"] == config[1]["architecture"] == "terrazzo_changed_vit"
    assert config[0]["pretrained_cfg"]["terrazzo"] == config[1]["pretrained_cfg"]["terrazzo"]


@pytest.mark.long
def test_every_mixer_comes_back(tmp_path):
    x = image((64, 64))
    for mixer in set(terrazzo.mixers()) - {"softmax"}:
        model = build("vit_tiny_patch16_224", depth=1, num_classes=5, dynamic_img_size=True)
        terrazzo.convert_attention(model, mixer)
        timm.models.save_for_hf(model, tmp_path / mixer)
        again = timm.create_model(f"local-dir:{tmp_path / mixer}", pretrained=True).eval()
        assert again.changes == model.changes
        assert again.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(again(x), model(x)), mixer


def test_a_changed_model_is_pushed_and_takes_arguments(hub):
    model = randomised(CHANGED["both"]())
    timm.models.push_to_hf_hub(model, "somebody/both", model_card=dict(description="Of tiles."))
    again = timm.create_model("hf-hub:somebody/both", pretrained=True, num_classes=7).eval()
    assert again(image((64, 64))).shape == (1, 7)
    wanted = model.forward_features(image((64, 64)))
    assert torch.equal(again.forward_features(image((64, 64))), wanted)
    larger = timm.create_model("hf-hub:somebody/both", pretrained=True, img_size=256).eval()
    assert larger.pos_embed.shape[1] == 1 + 16**2
    maps = timm.create_model("hf-hub:somebody/both", pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    wanted = model.forward_intermediates(image((64, 64)), indices=(1, 3), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps(image((64, 64))), wanted, strict=True))


def test_a_restored_model_has_its_own_name(tmp_path):
    model = vit()
    before = dict(model.pretrained_cfg)
    terrazzo.convert_attention(model, "hedgehog")
    assert model.pretrained_cfg != before
    terrazzo.convert_attention(model, "softmax")
    assert type(model) is VisionTransformer
    assert model.pretrained_cfg == before
    timm.models.save_for_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == before["architecture"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(base=None), "base is None, and must be the name of a model of timm"),
        (dict(base="hf-hub:somebody/else"), "no model is called 'hf-hub:somebody/else'"),
        (dict(base="terrazzo_changed_vit"), "must be the name of a model of timm"),
        (dict(base="resnet18"), "its model_args do not fit resnet18"),
        (dict(base="mctf_deit_tiny"), "base is 'mctf_deit_tiny', which is no model of timm's own"),
        (dict(changes=["no record"]), "changes is malformed"),
        (
            dict(changes={"convert": [{"mixer": "__import__('os')", "options": {}, "layers": [0]}]}),
            "record of the changes is malformed",
        ),
        (dict(changes={"convert": [{"mixer": "unknown", "options": {}, "layers": [0]}]}), "mixer must be one of"),
        (dict(changes={"reduce": {"method": "unknown", "options": {}, "blocks": [0]}}), "method must be one of"),
        (dict(changes={"reduce": {"method": "mctf", "options": {"model": 1}, "blocks": [0]}}), "changes do not fit"),
    ],
)
def test_foreign_configurations_are_refused(arguments, text, tmp_path):
    timm.models.save_for_hf(CHANGED["merged"](), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["terrazzo"] |= arguments
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=text) as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "\n" not in str(error.value)


def test_pickles_are_refused(tmp_path):
    timm.models.save_for_hf(CHANGED["merged"](), tmp_path)
    torch.save({"state_dict": SimpleNamespace(run=print)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_no_configuration():
    with pytest.raises(InputError, match="built from files of save_for_hf"):
        timm.create_model("terrazzo_changed_vit")
