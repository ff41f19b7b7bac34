"""ONNX files of converted ViTs."""

import pytest
import torch
from support.seeded import build

import terrazzo
from terrazzo.backbones.mixers import mixer_class
from terrazzo.errors import InputError
from terrazzo.tools.export.exportable import RawClassifier
from terrazzo.tools.export.formats.onnx import export_onnx
from terrazzo.tools.runtimes import open_file

SMALL = {name: dict(dense_up_to=0, edge=4) for name in ("anchor", "llsa", "routing", "sale", "tca")}
OPTIONS = {**SMALL, "na": dict(kernel=3), "dma": dict(dense_up_to=0)}
"""Options with which a mixer does not compute softmax attention on 8 x 12 patches."""
OPTIONS["llsa"] |= dict(part=2, topk=2)


def converted(names):
    """A ViT with one block for each mixer, and logits that depend on every patch; attention is far from uniform."""
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    options = dict(img_size=64, patch_size=8, num_classes=5, global_pool="avg", dynamic_img_size=True)
    model = build("test_vit", depth=len(names), **options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(12)
    for layer, name in enumerate(names):
        terrazzo.convert_attention(model, name, layers=[layer], **OPTIONS.get(name, {}))
    return RawClassifier(model, (0.5,) * 3, (0.5,) * 3).eval()


def pixels(*size):
    return 255 * torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))


def some(names, quick):
    """The names; all but a few quick ones are slow tests, because an export takes seconds."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.long
@pytest.mark.parametrize("name", some(terrazzo.mixers(), ("hedgehog", "llsa", "monarch", "retention")))
def test_images_of_one_size(name, tmp_path):
    module = converted([name])
    report = export_onnx(module, pixels(64, 96), tmp_path / "model.onnx", output_names=module.output_names)
    assert report.passed, report


OPEN = ("descriptor", "hedgehog", "infsa", "linear_infsa", "softmax")


@pytest.mark.long
@pytest.mark.parametrize("names", [["descriptor"], pytest.param(OPEN, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_open_height_and_width(names, tmp_path):
    """The file is right for images that are smaller and larger than the example."""
    module, path = converted(names), tmp_path / "model.onnx"
    report = export_onnx(module, pixels(64, 96), path, output_names=module.output_names, dynamic=("hw",))
    assert report.passed, report
    run, *_ = open_file("onnx", path)
    for size in ((40, 48), (160, 192)):
        with torch.no_grad():
            (found,), wanted = run(pixels(*size)), module(pixels(*size))
        torch.testing.assert_close(found, wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-3, atol=1e-4)


FIXED = [name for name in terrazzo.mixers() if not mixer_class(name).open_sizes]


@pytest.mark.long
@pytest.mark.parametrize("name", some(FIXED, ("llsa",)))
def test_mixers_that_choose_by_the_size_refuse_open_sizes(name, tmp_path):
    module, given = converted([name]), pixels(64, 96)
    reason = f"mixer '{name}' is exported for images of one size, because what it computes depends on the size"
    with pytest.raises(InputError, match=reason) as found:
        export_onnx(module, given, tmp_path / "model.onnx", output_names=module.output_names, dynamic=("hw",))
    assert "\n" not in str(found.value)
