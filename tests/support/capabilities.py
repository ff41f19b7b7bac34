"""Tests of a family's capabilities, both ways: a refusal must fail with the stated reason, all others must work.

`BackboneContract` inherits these tests; `test_NAME` tests the capability NAME of the list in
tools/reports/capabilities.py. The results must equal model_cards/results/capabilities.csv, the source of the pages'
tables; `pytest tests/backbones --write-capabilities` writes them there.
"""

import contextlib
import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest
import timm
import torch

from support.seeded import build, image
from terrazzo.tools import results
from terrazzo.tools.models import family_of
from terrazzo.tools.reports import capabilities as capability_results
from terrazzo.tools.reports.capabilities import NO, YES, Cell
from terrazzo.tools.runtimes import open_file

COMPILERS = ("aot_eager", "inductor")

SIZE, ODD = (64, 96), (97, 70)

SMALL_HEAD = {
    "model.neck.out_channels": 32,
    "model.bbox_head.in_channels": 32,
    "model.bbox_head.feat_channels": 32,
    "model.bbox_head.stacked_convs": 1,
}
"""Options of a detector: its training step is for the backbone."""

CONFIG = """
_base_ = ["{base}"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="{name}", out_indices={indices}),
    neck=dict(in_channels={channels}),
)
"""


@contextlib.contextmanager
def proven(cell: Cell, write: bool) -> Iterator[None]:
    """Wrap the body of a capability's test: it must work or fail as the cell says, and equal the stored cell.

    Args:
        cell: the claim of the family's test class.
        write: store the cell instead of comparing it with the stored cell.
    """
    with pytest.raises(Exception, match=re.escape(cell.reason)) if cell.supported == NO else contextlib.nullcontext():
        yield
    if write:
        capability_results.store(cell)
        return
    stored = capability_results.read().get((cell.family, cell.capability))
    hint = f"run `pytest {cell.test.split('::')[0]} --write-capabilities`, then `terrazzo cards`"
    assert stored is not None, f"{capability_results.PATH} has no row of {cell.family}, {cell.capability}; {hint}"
    assert stored == dataclasses.replace(cell, versions=stored.versions, commit=stored.commit), hint


class Files:
    """The exported files of a model; each file is made at its first use.

    Args:
        model: a classifier.
        folder: the folder for the files.
        allowed: which of "batch" and "hw" the family can leave open; the main file has these open.
        kind: the main file: "RawClassifier", or "RawFeatures" for a family with another family's operators. An export
            takes long, and the files differ only behind the last block.
    """

    def __init__(self, model: torch.nn.Module, folder: Path, allowed: tuple[str, ...], kind: str):
        pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
        self.model, self.folder, self.allowed, self.kind = model, folder, allowed, kind

    @cached_property
    def classifier(self):
        return self._onnx("RawClassifier", ODD, self.allowed)

    @cached_property
    def main(self):
        return self.classifier if self.kind == "RawClassifier" else self._onnx(self.kind, ODD, self.allowed)

    @cached_property
    def features(self):
        return self.main if self.kind == "RawFeatures" else self._onnx("RawFeatures", SIZE, ())

    def opened(self, what: str):
        """The main file with "batch" or "hw" left open."""
        return self.main if what in self.allowed else self._onnx(self.kind, SIZE, (what,))

    def module(self, kind: str) -> torch.nn.Module:
        from terrazzo.tools.export import exportable

        data = timm.data.resolve_model_data_config(self.model)
        return getattr(exportable, kind)(self.model, data["mean"], data["std"]).eval()

    def export(self, form, kind: str, size: tuple[int, int], dynamic: tuple[str, ...], suffix: str):
        from terrazzo.tools.export.checked import checked_export

        module, path = self.module(kind), self.folder / f"{kind}_{'_'.join(dynamic)}{suffix}"
        names = module.output_names
        return checked_export(form, module, pixels(size), path, output_names=names, dynamic=dynamic)

    def _onnx(self, kind: str, size: tuple[int, int], dynamic: tuple[str, ...]):
        from terrazzo.tools.export.formats.onnx import OnnxForm

        return self.export(OnnxForm(), kind, size, dynamic, ".onnx")


def pixels(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    return 255 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


class CapabilityContract:
    """Tests of capabilities. `example` is the first representative; with `-m slow` it is every variant."""

    representatives: tuple[str, ...] = ()
    refused: dict[str, str] = {}
    shallow: dict[str, dict] = {}
    operators_of = ""

    def shallow_model(self, name: str, **kwargs) -> torch.nn.Module:
        return build(name, **self.shallow.get(name, {}), **kwargs)

    @pytest.fixture
    def capability(self, request):
        title = request.function.__name__.removeprefix("test_").replace("_", " ")
        reason = self.refused.get(title, "")
        cell = Cell(
            family=family_of(self.representatives[0]),
            capability=title,
            supported=NO if reason else YES,
            reason=reason,
            model=self.representatives[0],
            test=request.node.nodeid.split("[")[0],
            versions=results.versions("timm", "mmdet", "mmsegmentation", "onnx", "onnxruntime", "openvino"),
            commit=results.commit(),
        )
        return proven(cell, request.config.getoption("--write-capabilities"))

    @pytest.fixture(scope="class")
    def files(self, example, tmp_path_factory):
        folder = tmp_path_factory.mktemp("files")
        allowed = tuple(what for what in ("batch", "hw") if f"onnx dynamic {what}" not in self.refused)
        kind = "RawFeatures" if self.operators_of else "RawClassifier"
        yield Files(self.shallow_model(example), folder, allowed, kind)
        shutil.rmtree(folder)  # up to gigabytes

    @pytest.fixture
    def openmmlab(self):
        pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")
        import terrazzo.openmmlab  # noqa: F401  before mmdet and mmseg, which need mmcv's operators

    def test_timm(self, example, capability):
        with capability, torch.no_grad():
            x = image(ODD)
            model = build(example)
            logits = model(x)
            assert logits.shape == (1, model.num_classes)
            assert logits.isfinite().all()
            model = build(example, features_only=True)
            info, maps = model.feature_info, model(x)
            wanted = [(1, c, *(math.ceil(side / r) for side in ODD)) for c, r in zip(info.channels(), info.reduction())]
            assert [tuple(found.shape) for found in maps] == wanted
            assert all(found.isfinite().all() for found in maps)

    @pytest.mark.long
    def test_mmdet(self, example, capability, openmmlab, tmp_path):
        from mmdet.testing import demo_mm_inputs

        data = demo_mm_inputs(2, [(3, *SIZE)] * 2, [2, 3], num_classes=80)
        with capability:
            train_step(example, "mmdet", "retinanet_r50_fpn", SMALL_HEAD, data, tmp_path)

    def test_mmseg(self, example, capability, openmmlab, tmp_path):
        from support.tiny_data import segmentation_batch

        options = {"model.pretrained": None, "model.data_preprocessor.size": SIZE}
        data = segmentation_batch(classes=19, channels=3, size=SIZE)
        with capability:
            train_step(example, "mmseg", "fpn_r50", options, data, tmp_path)

    @pytest.mark.long
    @pytest.mark.parametrize("backend", ["eager", *(pytest.param(x, marks=pytest.mark.slow) for x in COMPILERS)])
    def test_compile(self, name, backend, capability):
        """One graph serves every size, without breaks; "eager" runs the traced graph without a code generator."""
        torch._dynamo.reset()
        limit = 1e-3 if backend == "inductor" else 1e-4
        model = self.shallow_model(name)
        with capability, torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
            for size in ((64, 96), (96, 70)):
                torch.testing.assert_close(compiled(image(size)), model(image(size)), rtol=limit, atol=limit)

    @pytest.mark.slow  # ONNX files are made from the same program
    def test_pt2(self, files, capability):
        from terrazzo.tools.export.formats.pt2 import ProgramForm

        with capability:
            report = files.export(ProgramForm(), "RawClassifier", ODD, files.allowed, ".pt2")
            assert report.passed, report

    @pytest.mark.long
    def test_onnx(self, files, capability):
        with capability:
            assert files.main.passed, files.main
            if files.kind == "RawFeatures":
                check_features(files)

    @pytest.mark.slow  # some families' main file holds features, and other families give them by the same code
    def test_features_in_onnx(self, files):
        if "onnx" not in self.refused:
            check_features(files)

    @pytest.mark.long
    def test_onnx_dynamic_batch(self, files, capability):
        with capability:
            report = files.opened("batch")
            assert "larger batch" in {parity.source for parity in report.parities}
            assert report.passed, report

    @pytest.mark.long
    def test_onnx_dynamic_hw(self, files, capability):
        with capability:
            report = files.opened("hw")
            assert "larger image" in {parity.source for parity in report.parities}
            assert report.passed, report

    @pytest.mark.long
    def test_tensorrt_operators(self, files, capability):
        with capability:
            check_operators(files.main)

    @pytest.mark.long
    def test_openvino(self, files, capability):
        from terrazzo.tools.export.formats.openvino import OpenVinoForm

        with capability:
            assert files.classifier.passed, files.classifier
            form = OpenVinoForm()
            form.onnx = Copy(files.classifier.path)  # the costly half of the export already exists
            report = files.export(form, "RawClassifier", ODD, files.allowed, ".xml")
            assert report.passed, report

    @pytest.mark.long
    def test_fp16(self, files, capability):
        with capability:
            check_lowered(files, "fp16", 1e-2, pictures=1)

    @pytest.mark.long
    def test_int8(self, files, capability):
        with capability:
            check_lowered(files, "int8", 1e-1, pictures=2)


def check_features(files: Files) -> None:
    """Check the ONNX file of features: an output for each level, by name, and operators that TensorRT documents."""
    import onnx

    assert files.features.passed, files.features
    names = [output.name for output in onnx.load(files.features.path).graph.output]
    assert len(set(names)) == len(files.model.feature_info)
    assert all(f"stride{info['reduction']}" in name for name, info in zip(names, files.model.feature_info))
    check_operators(files.features)


def check_operators(report) -> None:
    """Check that TensorRT documents every operator of an ONNX file."""
    import onnx

    from terrazzo.tools.export.tensorrt.operators import problems

    found = problems(onnx.load(report.path))
    assert not found, "; ".join(map(str, found))


def check_lowered(files: Files, precision: str, limit: float, pictures: int) -> None:
    """Check that most layers are in the precision, that the error is within the limit, and that runtimes take the file.

    Args:
        pictures: the number of pictures for calibration and for the comparison.
    """
    import onnx

    from terrazzo.tools.export.precision.lowering import lower_file
    from terrazzo.tools.export.targets import floor
    from terrazzo.tools.export.tensorrt.operators import problems

    samples = [(picture,) for picture in floor(ODD, pictures).split(1)]
    file = files.folder / f"{precision}.onnx"
    found = lower_file(files.classifier.path, precision, file, samples, None, 0.0, precision)
    assert found.lowered.passed, found
    assert found.error <= limit
    assert len(found.lowered.kept) <= found.layers / 2, found.lowered.kept
    unknown = problems(onnx.load(found.path))
    assert not unknown, "; ".join(map(str, unknown))
    run, *_ = open_file("onnx", found.path)
    with torch.no_grad():
        wanted = files.module("RawClassifier")(*samples[0])
    assert (run(*samples[0])[0] - wanted).norm() <= limit * wanted.norm()


class Copy:
    """Replaces `OnnxForm` by an ONNX file that already exists."""

    def __init__(self, source: Path):
        self.source = source

    def write(self, task, path: Path) -> str:
        shutil.copyfile(self.source, path)
        return "a copy"


def train_step(name: str, package: str, base: str, options: dict, data: dict, folder: Path) -> None:
    """Put a backbone into a config of mmdet or mmseg, and take a training step that must reach its first layer."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.optim import OptimWrapper
    from mmengine.registry import MODELS, DefaultScope

    from terrazzo.openmmlab.config import load_config

    pyramid = timm.create_model(name, features_only=True, device="meta")
    indices, channels = pyramid.feature_info.out_indices, pyramid.feature_info.channels()
    config = folder / "model.py"
    config.write_text(
        CONFIG.format(base=f"{package}::_base_/models/{base}.py", name=name, indices=indices, channels=channels)
    )
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(package):
        model = revert_sync_batchnorm(MODELS.build(load_config(config, options=options).model))
        model.init_weights()
        first = next(model.backbone.parameters())
        before = first.detach().clone()
        losses = model.train().train_step(data, OptimWrapper(torch.optim.SGD(model.parameters(), 0.01)))
    assert all(torch.as_tensor(loss).isfinite().all() for loss in losses.values()), losses
    assert not torch.equal(first, before)
