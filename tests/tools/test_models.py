"""Distinguishing models from configs, and reading the facts that weights state."""

import builtins

import pytest
from timm.models import PretrainedCfg

from terrazzo.errors import InputError
from terrazzo.tools.models import published_top1, require_model
from terrazzo.tools.targets import is_config


@pytest.mark.parametrize(
    ("cfg", "top1"),
    [
        (PretrainedCfg(notes=("published top-1: 81.8",)), 81.8),
        (PretrainedCfg(description="ImageNet top-1 of 84 %"), 84.0),
        (PretrainedCfg(notes=("384 pixels",)), None),
        (PretrainedCfg(), None),
    ],
)
def test_published_top1(cfg, top1):
    assert published_top1(cfg) == top1


def test_models_and_configs_are_told_apart(tmp_path):
    assert not is_config("dinat_mini")
    assert not is_config("resnet18.a1_in1k")
    assert is_config("fpn_dinat-mini_floors")
    assert is_config("some/where.py")
    with pytest.raises(InputError, match="nor is there a config"):
        is_config("dinat_minny")


@pytest.mark.parametrize(("name", "close"), [("rgt_s_x22", "rgt_s_x2"), ("mtairr", "mtair"), ("resnet500", "resnet50")])
def test_close_names(name, close):
    with pytest.raises(InputError, match=rf"no model is called '{name}'; did you mean (\w+, )*{close}\b"):
        require_model(name)


def test_without_mmengine_models_still_work(monkeypatch):
    importing = builtins.__import__

    def without(name, *rest):
        if name.startswith(("terrazzo.openmmlab", "mmengine")):
            raise ModuleNotFoundError("No module named 'mmengine'", name="mmengine")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not is_config("resnet18")
    with pytest.raises(InputError, match="did you mean"):
        is_config("resnt18")
