"""Without a framework, its adapter says what to install."""

import re
import sys

import pytest

from terrazzo.errors import BackendError, TerrazzoError
from terrazzo.integrations import detectron2, supervision, ultralytics
from terrazzo.integrations._frameworks import framework


@pytest.mark.parametrize(
    ("call", "package", "install"),
    [
        (ultralytics.register, "ultralytics", "ultralytics"),
        (lambda: supervision.detections({"task": "detection", "things": []}), "supervision", "supervision"),
        (detectron2.backbone_class, "detectron2", "'git+https://github.com/facebookresearch/detectron2'"),
    ],
)
def test_names_the_package(call, package, install, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nothing(package), *sys.meta_path])
    detectron2.backbone_class.cache_clear()
    message = f"this needs {package}, which is not installed: pip install {install}"
    with pytest.raises(BackendError, match=re.escape(message)):
        call()


def test_a_framework_that_lacks_a_package_of_its_own_says_so(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import something_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_nowhere") as caught:
        framework("half_installed", "half_installed")
    assert not isinstance(caught.value, TerrazzoError)


class Nothing:
    """A finder that finds nothing of a package, and says so before others look."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
