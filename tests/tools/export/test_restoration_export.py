"""ONNX files of restoration networks."""

import pytest
import timm
import torch

from terrazzo.errors import InputError
from terrazzo.restoration._model import RestorationModel
from terrazzo.tools.export.checked import checked_export

pytest.importorskip("onnxruntime", reason="needs the extra 'export'")


def network(depth, **options):
    torch.manual_seed(0)
    options = dict(embed_dim=24, num_heads=2, split_size=(4, 8), depth=depth, **options)
    return timm.create_model("rgt_s_x2", **options).eval()


class Patches(RestorationModel):
    """Adds to each patch of 8 x 8 pixels a colour of its own: it takes multiples of 8 only."""

    multiple = 8

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Conv2d(3, 3, 8, 8)

    def restore(self, x):
        return x + torch.nn.functional.interpolate(self.mean(x), scale_factor=8.0)


def exported(model, path, size=(40, 33), **options):
    from terrazzo.tools.export.formats.onnx import OnnxForm

    example = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    return checked_export(OnnxForm(None), model, example, path, **options)


@pytest.mark.slow
def test_pictures_of_one_size(tmp_path):
    """Recursions may follow the size, because the file has one."""
    report = exported(network((2,)), tmp_path / "rgt.onnx")
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [("hw",), ("batch", "hw")], ids="+".join)
def test_pictures_of_any_size(dynamic, tmp_path):
    """With a fixed number of recursions a file takes smaller and larger pictures; the third block is shifted."""
    smaller = {"smaller": torch.rand(1, 3, 17, 20), "one column of windows": torch.rand(1, 3, 30, 16)}
    smaller["below a cell"] = torch.rand(1, 3, 9, 5)
    report = exported(network((2, 1), recursions=2), tmp_path / "rgt.onnx", dynamic=dynamic, checks=smaller)
    assert report.passed, report


@pytest.mark.long
@pytest.mark.parametrize("size", [(32, 40), pytest.param((37, 43), marks=pytest.mark.slow)], ids=str)
def test_multiples_and_other_sizes(size, tmp_path):
    """A file of a network that takes multiples takes every size, whatever the size of the example is."""
    torch.manual_seed(0)
    others = {f"{h}x{w}": torch.rand(1, 3, h, w) for h, w in ((33, 50), (48, 24), (57, 8), (5, 9), (2, 3))}
    report = exported(Patches().eval(), tmp_path / "patches.onnx", size, dynamic=("hw",), checks=others)
    assert report.passed, report


class Unchanged:
    """A format whose file is the module itself, which keeps the sizes that it is run on."""

    suffixes, runtime = (".none",), "nothing"

    def __init__(self):
        self.sizes = []

    def write(self, task, path):
        path.touch()
        return "1"

    def load(self, path, task):
        def run(x):
            self.sizes.append(tuple(x.shape[2:]))
            return task.module(x)

        return lambda *inputs: (run(*inputs),)

    def divergence(self, task, limit):
        return None


@pytest.mark.parametrize(
    ("module", "larger"), [(Patches(), (65, 97)), (torch.nn.PixelUnshuffle(8), (64, 96))], ids=["any", "multiples"]
)
def test_the_larger_image_is_odd_where_the_module_takes_it(module, larger, tmp_path):
    form = Unchanged()
    assert checked_export(form, module, torch.rand(1, 3, 32, 32), tmp_path / "x.none", dynamic=("hw",)).passed
    assert form.sizes == [(32, 32), larger]


def test_open_sizes_need_a_number_of_recursions(tmp_path):
    with pytest.raises(InputError, match=r"create_model\(name, recursions=2\), or model\.backbone\.recursions=2 in a"):
        exported(network((1,)), tmp_path / "rgt.onnx", dynamic=("hw",))
