"""torch.hub from a checkout: `hubconf.py` needs no installation."""

import shutil
from pathlib import Path

import pytest
from support.processes import run_code

ROOT = Path(__file__).parents[2]
CODE = """
import importlib.util, sys, torch
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
folder = sys.argv[1]
torch.manual_seed(0)
model = torch.hub.load(folder, "s2aformer_mini", source="local", features_only=True)
import terrazzo
assert terrazzo.__path__ == [folder], terrazzo.__path__
maps = model(torch.randn(2, 3, 64, 64))
sum(x.square().mean() for x in maps).backward()
torch.save(model.state_dict(), sys.argv[2])
again = torch.hub.load(folder, "s2aformer_mini", source="local", features_only=True)
again.load_state_dict(torch.load(sys.argv[2], weights_only=True))
x = torch.randn(1, 3, 64, 64)
assert all(torch.equal(a, b) for a, b in zip(model.eval()(x), again.eval()(x)))
spec = importlib.util.spec_from_file_location("hubconf", folder + "/hubconf.py")
hubconf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hubconf)
names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"]  # as torch.hub.list
assert set(names) == set(terrazzo.backbones._names.registered_models(terrazzo.backbones._names.EVERY_MODEL))
network = torch.hub.load(folder, "rgt_s_x2", source="local", depth=(1,), embed_dim=8, num_heads=2)
assert network(torch.rand(1, 3, 16, 18)).shape == (1, 3, 32, 36)
print(hubconf.dinat_mini.__doc__)
"""


@pytest.mark.slow
def test_loads_from_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "somebody_terrazzo_main"  # the name that torch.hub gives a download
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("backbones", "checkpoints", "integrations", "kernels", "restoration"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = run_code(CODE, folder, tmp_path / "weights.pth", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().split("\n")[-1].startswith("dinat_mini, with the arguments of timm.create_model")
