"""Repairs of mmengine 0.10 for today's Python packaging."""

import importlib.metadata
import importlib.util
import os

import mmengine.config.config
import mmengine.hub.hub
import mmengine.utils
import mmengine.utils.package_utils
from mmengine.config import Config


def is_installed(package: str) -> bool:
    """Whether a distribution, or else a module, of this name is installed."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(package) is not None
    return True


def get_installed_path(package: str) -> str:
    """The folder of a package, by the name of its distribution (`mmsegmentation`) or of its module (`mmseg`).

    Raises:
        ModuleNotFoundError: if the package does not exist.
    """
    names = [package]
    try:
        top_level = importlib.metadata.distribution(package).read_text("top_level.txt")
        names += (top_level or "").split()
    except importlib.metadata.PackageNotFoundError:
        pass
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            return os.path.dirname(spec.origin)
    raise ModuleNotFoundError(f"package '{package}' is not installed")


def repair() -> None:
    """Replaces the two look-ups that mmengine does through `pkg_resources`, which setuptools 82 removed.

    Without this, a config cannot inherit from another package (`_base_ = ["mmdet::..."]`).
    """
    if importlib.util.find_spec("pkg_resources") is not None:
        return
    for module in (mmengine.utils.package_utils, mmengine.utils, mmengine.config.config, mmengine.hub.hub):
        for function in (is_installed, get_installed_path):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


def find_packaged_bases() -> None:
    """Lets a config inherit from a packaged config: `_base_ = ["terrazzo::detection/NAME.py"]`, or by its bare name.

    mmengine knows only OpenMMLab's packages, and looks for their configs where OpenMMLab's installer puts them. For
    each it reads all descriptions of models in that package, which takes a quarter of a second. Here a config whose
    file is where its address says needs no description.
    """
    original = Config._get_cfg_path
    if hasattr(original, "original"):
        return

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        from terrazzo.openmmlab.config import find_config, packaged_configs

        beside = os.path.join(os.path.dirname(filename), cfg_path)
        bare = cfg_path.removesuffix(".py") in packaged_configs() and not os.path.isfile(beside)
        if cfg_path.startswith("terrazzo::") or bare:
            return str(find_config(cfg_path)), None
        file = _file_of(cfg_path)
        return (file, cfg_path.partition("::")[0]) if file else original(cfg_path, filename)

    get_cfg_path.original = original
    Config._get_cfg_path = staticmethod(get_cfg_path)


def _file_of(address: str) -> str | None:
    """The config file of an address such as `mmdet::retinanet/x.py`, where OpenMMLab's installer puts it."""
    package, separator, name = address.partition("::")
    spec = importlib.util.find_spec(package) if separator and package.isidentifier() else None
    if spec is None or spec.origin is None:
        return None
    file = os.path.join(os.path.dirname(spec.origin), ".mim", "configs", name)
    return file if os.path.isfile(file) else None
