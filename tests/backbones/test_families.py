"""A family is found by its file: no other place must name it."""

import importlib
import pickle
import shutil
from pathlib import Path

import pytest
import timm
from support.processes import run_code

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


@pytest.mark.parametrize("family", terrazzo.backbones.FAMILIES)
def test_variants_are_functions_of_their_module(family):
    """timm's files do the same: `vit_tiny_patch16_224` is a function of `timm.models.vision_transformer`."""
    module = importlib.import_module(f"terrazzo.backbones.{family}")
    names = timm.list_models(module=family)
    assert set(names) == set(module.default_cfgs) == {name for name in module.__all__ if name.islower()}
    for name in names:
        entrypoint = timm.models.model_entrypoint(name)
        assert entrypoint is getattr(module, name)
        assert (entrypoint.__module__, entrypoint.__name__) == (module.__name__, name)
        assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint
        assert timm.models.is_model_in_modules(name, [family])
        assert name in Path(module.__file__).read_text(), "grep must find a name"


def test_a_variant_says_what_it_is():
    text = "VMamba with embed_dim=128, depths=(2, 2, 20, 2); the class's other arguments work, too."
    assert timm.models.model_entrypoint("vmamba_base_s1l20").__doc__ == text


def test_arguments_of_a_variant_can_be_replaced():
    model = timm.create_model("roma_tiny", embed_dim=32, depth=6, features_only=True)
    assert model.feature_info.out_indices == (1, 3, 5)
    assert model.feature_info.channels() == [32] * 3
    model = timm.create_model("roma_tiny", embed_dim=32, features_only=True, out_indices=(0, 11))
    assert model.feature_info.out_indices == (0, 11)


@pytest.mark.long
def test_a_new_file_is_found(tmp_path):
    """The folder also holds a file and a folder that are not families."""
    copy = tmp_path / "terrazzo"
    copy.mkdir()
    for name in ("__init__.py", "_timm_hook.py", "_version.py", "errors.py"):
        shutil.copy(ROOT / name, copy)
    for name in ("backbones", "kernels", "restoration"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "backbones" / "toy.py").write_text(TOY)
    for shared in ("_no_family.py", "no_family/__init__.py"):
        path = copy / "backbones" / shared
        assert not path.exists()
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
    done = run_code(code, tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["toy_tiny"]
