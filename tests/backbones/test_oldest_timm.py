"""The oldest timm that pyproject.toml allows: many have an older one than the newest, which the other tests run on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.families import kinds

CODE = """
import sys, tempfile, timm, torch, terrazzo
assert timm.__version__ == sys.argv[1], timm.__version__
torch.set_grad_enabled(False)
x = torch.zeros(1, 3, 64, 64)
whole = set()
for name in sys.argv[2:]:
    model = timm.create_model(name, features_only=True, out_indices=(0, -1)).eval()
    assert [out.shape[1] for out in model(x)] == model.feature_info.channels(), name
    model = timm.create_model(name, num_classes=5).eval()
    assert model(x).shape == (1, 5), name
    if type(model.head) in whole:
        continue  # what follows is a matter of the head's class
    whole.add(type(model.head))
    model.reset_classifier(3)
    assert model(x).shape == (1, 3), name
    model.double().reset_classifier(4, "max")
    assert model.get_classifier().weight.dtype == torch.float64, name
    assert model(x.double()).shape == (1, 4), name
    width = model.forward_head(model.forward_features(x.double()), pre_logits=True).shape[1]
    assert width == model.head_hidden_size, name
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(model.float(), folder, model_args=dict(global_pool="max"))
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(x), model(x)), name
assert timm.create_model("mixer_vit_tiny", features_only=True, pyramid=True)(x)[0].shape == (1, 256, 16, 16)
model = terrazzo.reduce(timm.create_model("vit_tiny_patch16_224", num_classes=5).eval(), r=2)
with tempfile.TemporaryDirectory() as folder:
    timm.models.save_for_hf(model, folder)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
assert again.changes == model.changes
assert torch.equal(again(torch.ones(1, 3, 224, 224)), model(torch.ones(1, 3, 224, 224)))
"""


@pytest.mark.long
def test_classifiers_and_features(tmp_path):
    (version,) = re.findall(r'"timm>=([\d.]+)"', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([*command, f"timm=={version}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"timm {version} could not be fetched: {done.stderr[-200:]}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{CODE}"
    done = subprocess.run([sys.executable, "-c", code, version, *kinds()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
