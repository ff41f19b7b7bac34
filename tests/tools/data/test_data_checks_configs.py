"""Valid data in the layouts of the full-size data sets passes the packaged configs' checks without output."""

import pytest
from support import tiny_data

CONFIGS = [
    ("imagenet", "dinat-mini_8xb128-300e_imagenet"),
    ("coco", "mask-rcnn_dinat-mini_fpn_1x_coco"),
    ("coco", "mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic"),
    ("ADEChallengeData2016", "upernet_dinat-mini_8xb2-160k_ade20k-512x512"),
    ("loveDA", "upernet_roma-base_8xb2-80k_loveda-384x384"),
    ("cityscapes", "mask2former_dinat-large_8xb2-90k_cityscapes-512x1024"),
    ("cityscapes", "mask2former_dinat-large_16xb1-90k_cityscapes-instance"),
]


@pytest.fixture(scope="module")
def root_of(tmp_path_factory):
    """A function from the name of a full-size data set to its tiny version; each version is written once."""
    roots = {}

    def write(name):
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp("data") / name
            tiny_data.FULL_SIZE[name](roots[name])
        return roots[name]

    return write


@pytest.mark.parametrize(("data", "config"), CONFIGS)
def test_whole_data_passes(check, root_of, data, config):
    assert check(config, root_of(data), "train", "val", "test") == ""
