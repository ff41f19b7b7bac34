"""The zoom of segmentors: exact where it must be, chosen tiles, counts, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import terrazzo
from terrazzo.errors import InputError
from terrazzo.gated_zoom import Grid, Heads, load_heads
from terrazzo.gated_zoom._fusion import enlarged, fuse, reduced


class Strided(nn.Module):
    """A segmentor of stride 4 that sees at most 7 pixels beyond a pixel, for any size."""

    def __init__(self, classes=3):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Conv2d(8, classes * 16, 3, padding=1)

    def forward(self, x):
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % 4, 0, -height % 4), value=0.3)
        return F.pixel_shuffle(self.mix(self.backbone(x).tanh()), 4)[..., :height, :width]


def plain(classes=3):
    """A segmentor of stride 1 that sees 4 pixels beyond a pixel."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, classes, 3, padding=3, dilation=3))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["plain", "strided"])
def case(request):
    """A model in float64, and the options that make a zoom of it exact."""
    model, options = {
        "plain": (plain(), dict(tile=20, halo=4, stride=1)),
        "strided": (Strided(), dict(tile=20, halo=8, stride=4)),
    }[request.param]
    return model.double().eval(), options


SIZES = [(60, 80), (61, 83), (47, 101), (19, 22), (27, 90), (28, 29)]


@pytest.mark.parametrize("size", SIZES)
def test_all_tiles_give_the_full_pass(case, size):
    model, options = case
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found = terrazzo.zoom(model, scale=3, budget=1, gate=0, batch=3, **options)(images)
    torch.testing.assert_close(found, model(images).detach(), rtol=0, atol=1e-10)


def test_chosen_tiles_have_the_full_pass_inside(case):
    model, options = case
    images = torch.randn(2, 3, 61, 83, dtype=torch.float64)
    zoom = terrazzo.zoom(model, scale=3, budget=0.4, **options)
    look, full = zoom.look(images), model(images).detach()
    coarse = enlarged(look.coarse.result, (61, 83))
    assert len(look.tiles[0]) == len(look.tiles[1]) == 8 == int(0.4 * look.grid.count)
    for picture, tiles in enumerate(look.tiles):
        near = torch.zeros(61, 83, dtype=torch.bool)
        for index in tiles:
            inner = look.grid.inner(index)
            where = (picture, slice(None), *inner.slices)
            torch.testing.assert_close(look.result[where], full[where], rtol=0, atol=1e-10)
            near[
                max(0, inner.top - zoom.halo) : inner.bottom + zoom.halo,
                max(0, inner.left - zoom.halo) : inner.right + zoom.halo,
            ] = True
        assert not near.all()
        assert torch.equal(look.result[picture][:, ~near], coarse[picture][:, ~near])


@pytest.mark.parametrize("options", [dict(budget=0), dict(gate=1), dict(megapixels=1e-6), dict(budget=0.01)])
def test_without_a_fine_pass_it_is_the_coarse_pass(case, options):
    model, sizes = case
    images = torch.randn(2, 3, 61, 83, dtype=torch.float64)
    found = terrazzo.zoom(model, scale=2, **{**sizes, **options})(images)
    with torch.no_grad():
        assert torch.equal(found, enlarged(model(reduced(images, 2)), (61, 83)))


@pytest.mark.parametrize("budget", [0, 0.3, 1])
def test_megapixels_are_what_the_model_saw(case, budget):
    model, options = case
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 0].numel()))
    look = terrazzo.zoom(model, scale=3, budget=budget, batch=3, **options).look(
        torch.randn(2, 3, 61, 83, dtype=torch.float64)
    )
    assert round(sum(look.megapixels) * 1e6) == sum(seen)


def test_the_fused_map_is_continuous_in_the_halo():
    """A ramp joins a fine map of ones with a coarse map of zeros: no step is larger than the ramp's."""
    grid = Grid(60, 60, 20, 8)
    fine = torch.ones(2, 1, *grid.crop_size)
    y = fuse(torch.zeros(1, 60, 60), fine, grid, [4, 5])[0]
    assert (y[20:40, 20:60] == 1).all()
    assert y.diff(dim=0).abs().max() < 0.2
    assert y.diff(dim=1).abs().max() < 0.2
    assert (y[:12] == 0).all()
    assert (y[:, :12] == 0).all()


def test_overlapping_halos_are_averaged():
    grid = Grid(20, 60, 20, 10)
    fine = torch.stack([torch.full((1, *grid.crop_size), value) for value in (1.0, 3.0)])
    y = fuse(torch.zeros(1, 20, 60), fine, grid, [0, 2])[0, 5]
    assert (y[:20] == 1).all()
    assert (y[40:] == 3).all()
    assert y[29] == pytest.approx(0.05)  # the last pixel of the first halo; the other begins behind it
    assert y[30] == pytest.approx(3 * 0.05)


@pytest.mark.parametrize(("size", "stride"), [((61, 83), 4), ((60, 100), 1), ((19, 200), 4), ((33, 47), 2)])
def test_crops_contain_their_tiles_and_halos(size, stride):
    grid = Grid(*size, 16, 8, stride)
    covered = torch.zeros(size, dtype=torch.int)
    for index in range(grid.count):
        inner, crop = grid.inner(index), grid.crop(index)
        covered[inner.slices] += 1
        assert (crop.bottom - crop.top, crop.right - crop.left) == grid.crop_size
        assert crop.top % stride == crop.left % stride == 0
        assert crop.top <= max(0, inner.top - 8)
        assert crop.left <= max(0, inner.left - 8)
        assert min(size[0], inner.bottom + 8) <= crop.bottom <= size[0]
        assert min(size[1], inner.right + 8) <= crop.right <= size[1]
    assert (covered == 1).all()


@pytest.mark.parametrize("size", [(60, 80), (61, 83)])
def test_pooled_maps_are_means_over_tiles(size):
    """Cells count by the area that they share with a tile; maps in the picture's size give plain means."""
    grid, maps = Grid(*size, 20, 4), torch.rand(1, 2, *size, dtype=torch.float64)
    pooled = grid.pool(maps)
    for index in range(grid.count):
        mean = maps[(..., *grid.inner(index).slices)].mean((2, 3))
        torch.testing.assert_close(pooled.flatten(2)[..., index], mean)
    cells = torch.rand(1, 1, 7, 9, dtype=torch.float64)
    as_pixels = cells.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)  # 7 H x 9 W, exact
    fine = Grid(7 * size[0], 9 * size[1], 20 * 7, 4)
    torch.testing.assert_close(
        grid.pool(cells)[..., 0],
        torch.stack([as_pixels[..., r * 140 : (r + 1) * 140, : 20 * 9].mean((2, 3)) for r in range(fine.rows)], -1),
    )


def test_scores_without_training():
    """Entropy and margin find the tile where the coarse pass is unsure."""
    images = torch.zeros(1, 3, 60, 80)
    images[..., 20:40, 40:60] = 1.0

    def model(x):  # sure of class 0 where the picture is 0, undecided where it is 1
        return torch.cat([8 * (1 - x[:, :1]), 0 * x[:, :2]], 1)

    for score in ("entropy", "margin"):
        look = terrazzo.zoom(model, scale=2, tile=20, halo=4, budget=0.1, stride=1, score=score).look(images)
        assert look.tiles == [[6]]
        assert 0 <= look.coarse.scores.min() <= look.coarse.scores.max() <= 1
    assert terrazzo.zoom(model).score == "entropy"
    single = terrazzo.zoom(lambda x: 6 * x[:, :1] - 3, scale=2, tile=20, halo=4, budget=0.1, stride=1)
    assert single(images).shape == (1, 1, 60, 80)  # one channel is a foreground


def test_a_threshold_and_megapixels_limit_the_tiles():
    images = torch.randn(1, 3, 60, 80)
    options = dict(scale=2, tile=20, halo=4, stride=1)
    scores = terrazzo.zoom(plain(), **options).coarse(images).scores
    zoom = terrazzo.zoom(plain(), budget=1, region=0.5, **options)
    grid = zoom.grid(images)
    assert zoom.choose(torch.tensor([[0.4, 0.6, 0.7, 0.5]] * 3), grid, 0) == [1, 2, 5, 6, 9, 10]
    zoom = terrazzo.zoom(plain(), budget=0, megapixels=(1200 + 2 * 28 * 28 + 9) / 1e6, **options)
    look = zoom.look(images)
    assert len(look.tiles[0]) == 2
    assert look.megapixels[0] <= zoom.megapixels
    assert scores.shape == (1, 3, 4)


def trained_heads(channels=8, **settings):
    heads = Heads(channels, **{"scale": 3, "tile": 20, **settings})
    heads.trained[:] = True
    heads.thresholds[:] = torch.tensor([0.3, 0.6])
    return heads


def test_heads_choose_tiles_and_gate_pictures(tmp_path):
    model, heads = Strided().eval(), trained_heads()
    images = torch.randn(2, 3, 60, 84)
    with torch.no_grad():
        heads.gate.score.weight.zero_()
        heads.gate.score.bias.fill_(0.2)  # a probability of .55
    torch.save({"state_dict": {f"heads.{key}": value for key, value in heads.state_dict().items()}}, tmp_path / "h.pth")
    options = dict(scale=3, tile=20, halo=8, stride=4, heads=tmp_path / "h.pth", budget=0.5)
    for gate, off in ((0.5, False), ("stored", True), (0, False), (1, True)):
        look = terrazzo.zoom(model, gate=gate, **options).look(images)
        assert look.gated == [off, off]
        assert [len(tiles) for tiles in look.tiles] == [0 if off else 7] * 2
    features = model.backbone(reduced(images, 3))
    expected = heads.region(features, look.grid).sigmoid()
    torch.testing.assert_close(look.coarse.scores, expected)
    assert sum(parameter.numel() for parameter in Heads(512).parameters()) < 50_000
    with torch.no_grad():
        heads.thresholds[0] = expected.median()
    zoom = terrazzo.zoom(model, region="stored", **{**options, "heads": heads, "budget": 1})
    assert sum(map(len, zoom.look(images).tiles)) == (expected > expected.median()).sum()
    with pytest.raises(InputError, match="region='stored' is the threshold of the region head: leave score out"):
        terrazzo.zoom(model, region="stored", score="entropy", **options)


def test_heads_that_answer_nothing_need_no_features():
    """Another score chooses, and the gate has not been trained: a model without a backbone is no error."""
    heads = trained_heads()
    heads.trained[1] = False
    options = dict(scale=3, tile=20, halo=4, stride=1, heads=heads)
    images = torch.randn(1, 3, 60, 80)
    assert terrazzo.zoom(plain(), score="entropy", **options)(images).shape == (1, 3, 60, 80)
    with pytest.raises(InputError, match="heads need features"):
        terrazzo.zoom(plain(), **options)(images)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(scale=0.5), "scale is 0.5"),
        (dict(tile=100), "tile is 100; it must be a multiple of the model's stride, 32, such as 128"),
        (dict(halo=16), "halo is 16"),
        (dict(budget=2), "budget is 2"),
        (dict(gate=-1), "gate is -1"),
        (dict(gate="stored"), "pass heads=FILE"),
        (dict(megapixels=0), "megapixels is 0"),
        (dict(score="best"), "score is 'best'; choose one of region, entropy, margin, random"),
        (dict(score="region"), "needs a trained region head"),
        (dict(features="neck"), "features='neck' is no module of a Strided"),
        (dict(heads=Heads(8, scale=2)), "trained for scale 2, not 4; pass scale=2"),
        (dict(heads="none.pth"), "none.pth"),
    ],
)
def test_refusals(options, text):
    with pytest.raises((InputError, FileNotFoundError), match=text.replace("(", r"\(")):
        terrazzo.zoom(Strided(), **options)


def test_models_that_do_not_fit():
    with pytest.raises(InputError, match="a str is not a model"):
        terrazzo.zoom("fpn")
    with pytest.raises(InputError, match="a zoom needs logits"):
        terrazzo.zoom(lambda x: x.mean((2, 3)))(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="heads need features"):
        terrazzo.zoom(plain(), scale=3, tile=20, halo=4, stride=1, heads=trained_heads())(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="install is for models of mmseg"):
        terrazzo.zoom(plain()).install()


@pytest.fixture
def segmentor():
    """A segmentor of mmsegmentation that sees about 30 pixels beyond a pixel: the first two levels of a ResNet."""
    pytest.importorskip("mmseg", reason="needs the extra 'openmmlab'")
    import terrazzo.openmmlab  # noqa: F401  # isort: skip  before mmseg
    import mmseg.models  # noqa: F401
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    head = dict(type="FCNHead", in_channels=64, channels=8, num_convs=1, num_classes=4, norm_cfg=dict(type="BN"))
    settings = dict(
        type="EncoderDecoder",
        _scope_="mmseg",
        data_preprocessor=dict(type="SegDataPreProcessor", mean=[128.0] * 3, std=[64.0] * 3),
        backbone=dict(type="TerrazzoBackbone", name="resnet10t", out_indices=(1,), norm_outputs=False),
        decode_head=dict(head, in_index=0),
        test_cfg=dict(mode="whole"),
    )
    return MODELS.build(ConfigDict(settings)).eval()


def test_the_threshold_of_a_segmentor_with_one_channel(segmentor):
    assert terrazzo.zoom(segmentor).passes.threshold == 0.5  # not used for several channels
    segmentor.decode_head.threshold = 0.3
    assert terrazzo.zoom(segmentor).passes.threshold == 0.3


def test_a_segmentor_of_mmsegmentation(segmentor):
    """All tiles give the segmentor's own labels in `test_step`, which resizes to the picture's first size."""
    from support.tiny_data import segmentation_batch

    batch = segmentation_batch(4, 3, (128, 160))
    with torch.no_grad():
        full = [sample.seg_logits.data.clone() for sample in segmentor.test_step(batch)]
    seen = []
    zoom = terrazzo.zoom(segmentor, scale=4, tile=64, halo=32, budget=1, stride=4)
    zoom.on_look = seen.append
    assert zoom.install() is segmentor
    with torch.no_grad():
        for found, wanted in zip(segmentor.test_step(batch), full):
            torch.testing.assert_close(found.seg_logits.data, wanted, rtol=0, atol=1e-4)
            assert torch.equal(found.pred_sem_seg.data[0], found.seg_logits.data.argmax(0))
    assert [len(look.tiles) for look in seen] == [2]
    assert zoom.passes.with_features(torch.zeros(1, 3, 64, 64))[1].shape == (1, 64, 16, 16)


def refining(classes, scale=4, tile=20):
    """Heads with a refinement that counts as trained, and changes nothing so far."""
    heads = Heads(8, scale=scale, tile=tile, classes=classes)
    heads.trained[2] = True
    return heads


@torch.no_grad()
def test_refinement():
    """It starts as the plain fusion; then it corrects tiles and halos, and nothing away from them."""
    model, images, heads = plain().eval(), torch.randn(2, 3, 61, 83), refining(3)
    options = dict(tile=20, halo=4, stride=1, budget=0.3)
    fused = terrazzo.zoom(model, **options).look(images)
    zoom = terrazzo.zoom(model, heads=heads, refine=True, **options)
    assert zoom.score == "entropy"
    assert torch.equal(zoom(images), fused.result)
    torch.nn.init.normal_(heads.refine.mix.weight)
    found = zoom.look(images)
    assert found.megapixels == fused.megapixels
    for picture, tiles in enumerate(found.tiles):
        changed, inside = (found.result != fused.result)[picture].any(0), torch.zeros(61, 83, dtype=torch.bool)
        near = inside.clone()
        for index in tiles:
            inner = found.grid.inner(index)
            inside[inner.slices] = True
            near[max(0, inner.top - 4) : inner.bottom + 4, max(0, inner.left - 4) : inner.right + 4] = True
        assert changed[inside].all()
        assert not changed[~near].any()
    for spared in (dict(budget=0), dict(gate=1)):
        look = terrazzo.zoom(model, heads=heads, refine=True, **(options | spared)).look(images)
        assert torch.equal(look.result, enlarged(look.coarse.result, (61, 83)))


def test_refinement_refusals(tmp_path):
    options = dict(tile=20, halo=4, stride=1, refine=True)
    untrained = Heads(8, tile=20, classes=3)
    for heads in (None, Heads(8, tile=20), untrained):
        with pytest.raises(InputError, match="refine=True needs a trained refinement"):
            terrazzo.zoom(plain(), heads=heads, **options)
    with pytest.raises(InputError, match="trained for 5 classes, and the model has 3"):
        terrazzo.zoom(plain(), heads=refining(5), **options)(torch.randn(1, 3, 40, 40))
    torch.save({f"heads.{name}": value for name, value in refining(5).state_dict().items()}, tmp_path / "heads.pth")
    assert load_heads(tmp_path / "heads.pth").refine.classes == 5
