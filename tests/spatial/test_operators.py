"""Each operator over virtual ranks equals one process in float64: values, and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from support.shared_rows import SIZES, check_module, on_ranks
from torch import nn

import terrazzo.spatial._operators as operators
from terrazzo.errors import InputError
from terrazzo.spatial import Entry, Part
from terrazzo.spatial._functions import through
from terrazzo.spatial._parallelize import replace

MODULES = {
    "3x3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "without padding": lambda: nn.Conv2d(4, 6, (1, 3)),
    "same": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "stride 2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "patches": lambda: nn.Conv2d(4, 6, 2, stride=2),
    "overlapping patches": lambda: nn.Conv2d(4, 6, 5, stride=2, padding=2),
    "dilated": lambda: nn.Conv2d(4, 6, 3, padding=3, dilation=3),
    "groups": lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4),
    "1x1 of stride 2": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
    "transposed 3x3": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, overlapping": lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    "transposed, dilated": lambda: nn.ConvTranspose2d(4, 4, 3, padding=2, dilation=2, groups=2),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "max pool, ceil": lambda: nn.MaxPool2d(2, 2, ceil_mode=True),
    "max pool, dilated": lambda: nn.MaxPool2d(3, 1, 1, dilation=2),
    "average pool": lambda: nn.AvgPool2d(3, 2, 1),
    "average pool, ceil": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average pool of real pixels": lambda: nn.AvgPool2d(5, 1, 2, count_include_pad=False),
    "average pool of real pixels, ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    "sum pool": lambda: nn.AvgPool2d(3, 1, 1, divisor_override=1),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear, aligned": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "bilinear, smaller": lambda: nn.Upsample(scale_factor=0.5, mode="bilinear"),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest-exact": lambda: nn.Upsample(scale_factor=3, mode="nearest-exact"),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False, affine=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1)),
    "stack": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 6, 7, padding=3, groups=6),
    ),
}
GLOBAL = {
    "global average": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "global maximum": lambda: nn.AdaptiveMaxPool2d(1),
    "pooled and normalised": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)),
    "pooled and convolved": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(4, 5, 3, padding=1)),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, size):
    torch.manual_seed(0)
    shared = check_module(MODULES[name](), size)
    if name == "batch norm":
        alone = nn.BatchNorm2d(4).double()
        generator = torch.Generator().manual_seed(size[0] * size[1])
        alone(torch.randn(2, 4, *size[:2], generator=generator, dtype=torch.float64))
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(shared.state_dict()[key], value)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
@pytest.mark.parametrize("name", GLOBAL)
def test_poolings_of_the_whole_map(name, size):
    torch.manual_seed(0)
    check_module(GLOBAL[name](), size, dim=0)


@pytest.mark.parametrize("name", ["SqueezeExcite", "EffectiveSEModule", "GroupNorm1", "GlobalResponseNorm"])
def test_layers_of_timm(name):
    import timm.layers
    from timm.layers.grn import GlobalResponseNorm

    torch.manual_seed(0)
    if name == "GlobalResponseNorm":
        module = GlobalResponseNorm(8)
        nn.init.normal_(module.weight)
        check_module(module, SIZES[1], channels=8, dim=1, rows=1)
    else:
        check_module(getattr(timm.layers, name)(8), SIZES[1], channels=8)


REACH = operators.reach


def test_a_halo_that_is_one_row_short_is_found(monkeypatch):
    def short(out, stride, before, extent):
        needs = REACH(out, stride, before, extent)
        return [(low, high) if i == len(needs) - 1 else (low - 1, high - 1) for i, (low, high) in enumerate(needs)]

    monkeypatch.setattr(operators, "reach", short)
    for name in ("3x3", "max pool", "average pool"):
        with pytest.raises(AssertionError, match="differ"):
            check_module(MODULES[name](), SIZES[1])


def test_sizes_of_the_rank_in_place_of_the_whole_are_found(monkeypatch):
    taps = operators._taps
    monkeypatch.setattr(operators, "_taps", lambda a, b, old, new, *rest: taps(a, b, old, new + 1, *rest))
    with pytest.raises(AssertionError, match="differ"):
        check_module(MODULES["bilinear, aligned"](), SIZES[1])


@pytest.mark.parametrize("name", ["batch norm", "group norm", "global average", "adaptive average"])
def test_a_missing_sum_over_ranks_is_found(name, monkeypatch):
    monkeypatch.setattr(Part, "total", lambda self, x: x)
    make = {**MODULES, **GLOBAL}[name]
    with pytest.raises(AssertionError, match=r"differ|not close"):
        check_module(make(), SIZES[1], dim=0 if name in GLOBAL else 2)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.MaxPool2d(2, return_indices=True), "indices"),
        (nn.LayerNorm((3, 3)), "over positions"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention: no entry"),
        (nn.Sequential(nn.Identity(), nn.Softmax(1)), r"1 \(torch.nn.modules.activation.Softmax"),
        (nn.Conv1d(4, 4, 3), "tokens"),
    ],
)
def test_what_is_not_known_is_refused_by_name(module, words):
    with pytest.raises(InputError, match=words):
        replace(module, False)
    assert not any("forward" in vars(child) for child in module.modules())


def test_a_synchronised_batch_norm_is_refused_in_training():
    model = nn.SyncBatchNorm(4)
    replace(model, False)
    with pytest.raises(InputError, match="use BatchNorm2d"):
        on_ranks(lambda part, x: model(x), torch.zeros(1, 4, 6, 9), 2, 3)


def test_mmengines_batch_norm_in_the_place_of_a_synchronised_one():
    utils = pytest.importorskip("mmengine.model", reason="needs the extra 'openmmlab'")
    check_module(utils.revert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(4))), SIZES[1])


def test_a_map_of_unknown_size_is_refused_by_the_name_of_its_reader():
    model = nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 3, padding=1))
    replace(model, False)
    with pytest.raises(InputError, match="1 got 5 rows and 9 columns"):
        on_ranks(lambda part, x: model(x[:, :, 1:]), torch.zeros(1, 4, 12, 9), 2, 2)


class TwoHalves(nn.Module):
    """Maps of half the rows, rounded down and up: only the last rank's sizes tell which is which."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        up = self.second(self.up(x))
        return up + F.interpolate(self.first(self.down(x)), size=up.shape[2:], mode="bilinear")


def test_sizes_that_a_rank_takes_for_each_other_are_told_apart_by_all():
    check_module(TwoHalves(), (33, 8, 2, 2), entries={TwoHalves: Entry(through)})


def test_maps_that_no_rank_tells_apart_are_refused():
    """Each of two ranks has 2x8 pixels of a map of 4x8, and 2x8 pixels of a pooled map that all have."""
    pools = nn.ModuleList([nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((2, 4))])
    replace(pools, False)
    with pytest.raises(InputError, match="another number of ranks"):
        on_ranks(lambda part, x: [pool(x) for pool in pools][-1], torch.zeros(1, 4, 8, 8), 2, 2)


def test_a_first_row_within_a_stride_is_refused():
    model = nn.Conv2d(4, 4, 3, stride=2)
    replace(model, False)
    with pytest.raises(InputError, match="stride 2, and rank 1 begins at row 3"):
        on_ranks(lambda part, x: model(x), torch.zeros(1, 4, 6, 9), 2, 3)


def test_a_module_that_was_parallelized_does_not_run_alone():
    model = nn.Conv2d(4, 4, 3)
    replace(model, False)
    with pytest.raises(InputError, match="call the whole model"):
        model(torch.zeros(1, 4, 6, 9))
