"""A family is found by its file: nothing else has to name it."""

import shutil
import subprocess
import sys
from pathlib import Path

import terrazzo.backbones
from terrazzo.tools.models import registered_models

ROOT = Path(__file__).parents[2]

TOY = """
from timm.models import register_model
from torch import nn

@register_model
def toy_tiny(pretrained=False, **kwargs):
    return nn.Identity()
"""


def test_the_files_are_the_families():
    files = {path.stem for path in (ROOT / "backbones").glob("*.py") if not path.stem.startswith("_")}
    assert files == set(terrazzo.backbones.FAMILIES) == set(registered_models().values())


def test_a_new_file_is_found(tmp_path):
    """Also beside a folder and a file that are no families."""
    copy = tmp_path / "terrazzo"
    copy.mkdir()
    for name in ("__init__.py", "_version.py", "errors.py"):
        shutil.copy(ROOT / name, copy)
    for name in ("backbones", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "backbones" / "toy.py").write_text(TOY)
    for shared in ("_shared.py", "mixers/__init__.py"):
        path = copy / "backbones" / shared
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise AssertionError('this is no family')")
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, sys.argv[1])
import terrazzo, timm
assert terrazzo.__file__.startswith(sys.argv[1]), terrazzo.__file__
print(*timm.list_models(module="toy"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["toy_tiny"]
