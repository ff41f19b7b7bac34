"""What ships: every module imports from a built wheel, layers import downwards only, and importing stays light."""

import ast
import functools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.processes import run_code

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("backbones", "checkpoints", "clips", "degradations", "gated_zoom", "integrations", "kernels", "necks"),
    *("openmmlab", "restoration", "spatial", "configs", "tools"),
)
# Layer -> the layers of terrazzo that it may import.
ARROWS = {
    "kernels": {"errors"},
    "backbones": {"errors", "kernels"},
    "checkpoints": {"_files", "errors", "backbones"},
    "clips": {"errors", "kernels", "backbones"},
    "degradations": {"_settings", "errors"},
    "gated_zoom": {"errors", "checkpoints"},
    "integrations": {"_pictures", "errors", "backbones", "tools"},
    "necks": {"errors", "kernels", "backbones"},
    "restoration": {"errors", "kernels", "backbones"},
    "spatial": {"errors", "kernels", "backbones"},
    "openmmlab": {
        "_files",
        "_pictures",
        "_settings",
        "errors",
        "kernels",
        "backbones",
        "checkpoints",
        "clips",
        "degradations",
        "gated_zoom",
        "necks",
        "restoration",
        "spatial",
    },
    "configs": {"openmmlab"},
    "tools": {
        "_files",
        "_pictures",
        "_pixel_limit",
        "errors",
        "_version",
        "kernels",
        "backbones",
        "checkpoints",
        "degradations",
        "gated_zoom",
        "necks",
        "openmmlab",
        "restoration",
        "spatial",
    },
}
# Packages of tools/ from the bottom up: a package imports only packages before it. "" means the files of tools/ itself.
ROOMS = (
    "",
    "data",
    "inspect",
    "runtimes",
    "predict",
    "export",
    "training",
    "zoom",
    "bench",
    "probe",
    "reports",
    "doctor",
    "verbs",
)
# Packages that a layer must not import at the top of a module.
FOREIGN = {
    "kernels": {"timm", "mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton", "numba", "llvmlite"},
    "backbones": {"mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton"},
    "checkpoints": {"mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton"},
    "clips": {"timm", "mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton", "numba"},
    "degradations": {"timm", "mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton", "numba"},
    "gated_zoom": {"timm", "mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton", "numba"},
    "integrations": {"detectron2", "mmengine", "mmcv", "onnx", "supervision", "torchvision", "ultralytics"},
    "openmmlab": {"mmdet", "mmseg", "onnx"},
    "restoration": {"mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton"},
    "spatial": {"timm", "mmengine", "mmcv", "mmdet", "mmseg", "onnx", "triton", "numba"},
}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@functools.cache
def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
            assert node.level == 0, f"{path}: relative import"
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "terrazzo" and len(parts) > 1 and parts[1] not in ("TerrazzoError", "__version__"):
            assert parts[1] == layer or parts[1] in ARROWS[layer], f"{layer} must not import {name}"
        if layer == "kernels" and path.stem.startswith("fused_") and parts[0] in ("triton", "numba", "llvmlite"):
            continue  # Triton's kernels; the fused forms import them at the first launch
        if path.parent == ROOT / "openmmlab" / "clips" and path.stem != "__init__" and parts[0] == "mmdet":
            continue  # classes on mmdet's; `clips` imports them when a model is built
        assert parts[0] not in FOREIGN.get(layer, ()), f"{layer} must not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "tools").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_of_tools(path):
    def room(parts):
        return parts[0] if parts and (ROOT / "tools" / parts[0]).is_dir() else ""

    own = room(path.relative_to(ROOT / "tools").parts)
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["terrazzo", "tools"]:
            assert ROOMS.index(room(parts[2:])) <= ROOMS.index(own), f"{own or 'tools'} must not import {name}"
            assert own != "verbs" or room(parts[2:]) != "verbs", f"a verb must not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_of_kernels(path):
    """Operators share dispatch/, triton_host/ and numba_host/, and nothing else."""
    own = path.relative_to(ROOT / "kernels").parts[0]
    hosts = {"triton_host", "numba_host"}
    below = {"dispatch": {"dispatch", *hosts}, **{host: {host} for host in hosts}}
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["terrazzo", "kernels"] and own != "__init__.py":
            assert parts[2] in below.get(own, {own, *below}), f"{own} must not import {name}"


def test_importing_terrazzo_is_light():
    """Besides the imports of torch and timm."""
    code = (
        "import sys, torch, timm; import torch._dynamo; before = set(sys.modules); import terrazzo\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'onnx', 'onnxruntime', 'triton', 'cv2', 'numba'}\n"
        "print(*sorted(new & heavy))\n"
        "print(*sorted(name for name in set(sys.modules) - before if name.split('.')[0] != 'terrazzo'))"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    heavy, others = done.stdout.splitlines()
    assert heavy == ""
    assert len(others.split()) <= 5, others


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, and what building it printed."""
    pytest.importorskip("build", reason="needs the extra 'dev'")
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: an old `build/` of the checkout would put files into the wheel that the sources no longer have.
    source = folder / "source"
    others = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "data", "demo", "exports", "work_dirs")
    shutil.copytree(ROOT, source, ignore=lambda folder, names: others(folder, names) if Path(folder) == ROOT else [])
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stderr + done.stdout:
        pytest.skip("the build backend could not be fetched: " + done.stdout[-200:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl")), done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(built):
    return built[0]


@pytest.mark.long
def test_building_warns_of_no_folder(built):
    """Each `pip install` would show a warning about a data folder that looks like a package."""
    assert "`packages` configuration" not in built[1], built[1]


def test_wheel_holds_every_module_and_table(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tables = [path for folder in ("tools", "model_cards") for path in (ROOT / folder).rglob("*.csv")]
    wanted = {f"terrazzo/{path.relative_to(ROOT).as_posix()}" for path in [*sources(), *tables]}
    wanted |= {f"terrazzo/{name}" for name in ("__init__.py", "errors.py", "py.typed", "tools/reports/explorer.html")}
    assert not wanted - names
    top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert top == {"terrazzo"}, "a generic name would be installed at top level"
    assert not any("test" in name.split("/")[1] for name in names if "/" in name and name.split("/")[1] != "tools")


@pytest.mark.long
def test_wheel_imports(wheel, tmp_path):
    """Every module, from the wheel alone: an environment that sees the dependencies but not this checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    modules = sorted(
        path.relative_to(tmp_path).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in tmp_path.glob("terrazzo/**/*.py")
        if "configs" not in path.parts
    )
    code = """
import importlib, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, sys.argv[1])
import terrazzo, timm
assert terrazzo.__file__.startswith(sys.argv[1]), terrazzo.__file__
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("tensorrt", "mmaction"):  # no dependencies: one wants a GPU, the other is repaired
            raise
print(*terrazzo.backbones.FAMILIES)
print(len(timm.list_models(module="dinat")))
"""
    done = run_code(code, tmp_path, *modules, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *families, count = done.stdout.split()
    assert set(families) == {path.stem for path in (ROOT / "backbones").glob("[!_]*.py")}
    assert int(count) >= 20
