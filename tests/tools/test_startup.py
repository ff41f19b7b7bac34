"""What starting costs: help and lists import neither PyTorch nor timm, and `import terrazzo` waits for timm.

Nothing is timed: the tests look at imported modules. `tests/test_packaging.py` has what terrazzo adds to timm.
"""

import ast
import subprocess
import sys

import pytest
from support.processes import run_code

import terrazzo
from terrazzo.tools import catalogue, results

LIGHT = ("list", "info", "train", "test", "infer", "convert", "floors", "demo", "probe", "compare", "doctor", "cards")
"""The verbs with a help that needs neither PyTorch nor timm."""

COMMANDS = """
import sys
from terrazzo.tools.cli import cli
for line in sys.argv[1:]:
    try:
        cli.main(line.split())
    except SystemExit as end:
        assert not end.code, line
print("modules", len(sys.modules))
print("heavy", *sorted({"torch", "timm", "torchvision", "PIL", "numpy", "mmengine", "cv2"} & set(sys.modules)))
"""


def started(*lines: str) -> tuple[int, list[str]]:
    """How many modules a new process has after these commands, and which heavy packages are among them."""
    done = subprocess.run([sys.executable, "-c", COMMANDS, *lines], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    modules, heavy = done.stdout.splitlines()[-2:]
    return int(modules.split()[1]), heavy.split()[1:]


def test_help_and_list_are_light():
    count, heavy = started("--help", "list")
    assert not heavy
    assert count < 700, "PyTorch and timm have 2700"


def test_help_of_verbs_is_light():
    _, heavy = started(*(f"{verb} --help" for verb in LIGHT))
    assert not set(heavy) & {"torch", "timm", "torchvision", "mmengine"}


def test_the_list_of_models_is_up_to_date():
    """`terrazzo cards` writes it."""
    assert results.read(catalogue.PATH, catalogue.Entry) == catalogue.registered()


def test_a_new_family_is_listed_without_the_file(monkeypatch):
    monkeypatch.setattr(catalogue.results, "read", lambda path, kind: [])
    assert catalogue.entries() == catalogue.registered()


FIRST = """
import importlib.util, sys
for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
    del sys.modules[name]
import terrazzo
assert "timm" not in sys.modules and "terrazzo.backbones" not in sys.modules
assert importlib.util.find_spec("timm").origin.endswith("__init__.py")  # looking for timm imports nothing
assert "timm" not in sys.modules
finders = len(sys.meta_path)
from timm.models import is_model
assert is_model("dinat_mini") and is_model("resnet18")
assert len(sys.meta_path) == finders - 1
assert "dinat" in terrazzo.backbones.FAMILIES
"""


@pytest.mark.long
def test_terrazzo_may_be_imported_before_timm():
    done = run_code(FIRST)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_name_of_terrazzo_imports_timm():
    """The hook runs inside the import of the backbones, and changes nothing about it."""
    code = FIRST.split("import terrazzo\n")[0] + (
        "import terrazzo\nterrazzo.convert_attention\nimport timm\nassert timm.is_model('vmamba_tiny_s1l8')\n"
        "assert terrazzo.kernels.ssd and terrazzo.mixers()\n"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr


def test_a_predictor_of_whole_pictures_loads_nothing_for_tiles():
    code = "import sys, terrazzo\nterrazzo.Predictor\nprint(*sorted(sys.modules))"
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "terrazzo.tools.predict.predictor" in loaded
    assert not [
        name for name in loaded if name.startswith(("terrazzo.spatial", "terrazzo.tools.predict.tiles.segments"))
    ]


def test_names_for_type_checkers_are_the_names_of_python():
    tree = ast.parse((results.ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    checked = {alias.asname: node.module for node in block.body for alias in node.names}
    packages = dict.fromkeys(terrazzo._PACKAGES, "terrazzo")
    assert checked == packages | terrazzo._PLACES
    for name in checked:
        assert getattr(terrazzo, name) is not None
        assert name in dir(terrazzo)
    with pytest.raises(AttributeError, match="has no attribute 'polish'"):
        terrazzo.polish  # noqa: B018
