"""The label maps of images that virtual ranks share equal those of mmsegmentation."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmseg.structures import SegDataSample

from terrazzo.openmmlab.config import load_config
from terrazzo.openmmlab.spatial_labels import label_rows, own_labels, unpredictable
from terrazzo.spatial import LocalGroup, Part
from terrazzo.spatial._parallelize import replace

SMALL = {
    "model.backbone.depths": (1, 1, 1, 1),
    "model.backbone.embed_dim": 8,
    "model.backbone.num_heads": (1, 2, 2, 2),
    "model.backbone.dilations": [[2], [1], [1], [1]],
    "model.neck.in_channels": [8, 16, 32, 64],
    "model.neck.out_channels": 8,
    "model.decode_head.in_channels": [8] * 4,
    "model.decode_head.channels": 8,
}


@pytest.fixture(scope="module")
def segmentor():
    """Builds a small segmentor in float64."""

    def build(head=None, **options):
        cfg = load_config("fpn_dinat-mini_floors", options={**SMALL, **options})
        cfg.model.decode_head.update(head or {})
        init_default_scope("mmseg")
        torch.manual_seed(0)
        return MODELS.build(cfg.model).double().eval()

    return build


SHAPES = {
    "as it is": ((128, 96), {}),
    "odd sides, whose maps are rounded up and down": ((200, 91), {}),
    "padded and resized": ((128, 96), dict(img_padding_size=(0, 5, 0, 9), pad_shape=(128, 96), ori_shape=(150, 70))),
    "made smaller and flipped": ((128, 96), dict(ori_shape=(101, 96), flip=True, flip_direction="horizontal")),
}


@pytest.mark.parametrize(("shape", "facts"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_labels_of_virtual_ranks(segmentor, shape, facts, ranks):
    check(segmentor(), shape, facts, ranks)


def test_a_single_class(segmentor):
    check(segmentor(dict(num_classes=2, out_channels=1, threshold=0.5)), (96, 64), {}, 2)


def check(model, shape, facts, ranks):
    shared = copy.deepcopy(model)
    replace(shared, True)
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metas = [{"ori_shape": shape, "img_shape": shape, **facts}] * 2
    samples = [SegDataSample(metainfo=meta) for meta in metas]
    wanted = [sample.pred_sem_seg.data for sample in model.predict(images, samples)]

    def of_rank(group):
        part = Part(group, *shape)
        labels = own_labels(part, shared, part.scatter(images), metas)
        start, end = label_rows(metas[0], ranks)[part.rank]
        assert {tuple(one.shape) for one in labels} == {(1, end - start, metas[0]["ori_shape"][1])}
        return labels

    for found, want in zip(zip(*LocalGroup(ranks).run(of_rank)), wanted):
        assert len(want.unique()) > 1
        assert torch.equal(torch.cat(found, 1), want.long())


def test_windows_are_refused(segmentor):
    assert unpredictable(segmentor()) is None
    slide = segmentor(**{"model.test_cfg": dict(mode="slide", crop_size=(64, 64), stride=(32, 32))})
    assert "mode slide" in unpredictable(slide)
    assert "the model is a Linear" in unpredictable(torch.nn.Linear(1, 1))
