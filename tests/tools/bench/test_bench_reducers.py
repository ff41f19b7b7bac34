"""`terrazzo bench reduce --methods`: reducers at equal multiply-adds."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from terrazzo.backbones._reduce import reduce
from terrazzo.backbones.reducers import reducers
from terrazzo.tools import results
from terrazzo.tools.bench.drift import AGREEMENT, DRIFT, MAP
from terrazzo.tools.bench.matching import CLOSE, LastMap, Matcher
from terrazzo.tools.bench.reducers import MACS, SHARE, contenders, named, table
from terrazzo.tools.inspect.measure import measure
from terrazzo.tools.inspect.timing import FORWARD
from terrazzo.tools.mechanisms import chosen, on_meta

MODEL = "test_vit"
SMALL = ("--seconds", 0.001, "--batch", 1, "--size", 96, 128)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        noise = np.random.default_rng(seed).integers(0, 255, (14, 18, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((140, 110)).save(folder / f"{seed}.png")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("maps", [pytest.param(False, marks=pytest.mark.slow), True])
def test_shares_are_hit(maps):
    """A share is reached to within what a token weighs, by every method where vectors count; `measure` agrees."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=6, embed_dim=48, num_heads=3)
    matcher = Matcher(model, (224, 224), maps)
    methods = ("pool",) if maps else reducers()
    for method, fixed in (("evit", {"fuse": False}), *((method, {}) for method in methods)):
        options, share = matcher.options(method, fixed, 0.8)
        assert share == pytest.approx(0.8, abs=2 * CLOSE), method
        assert options | fixed == options
        model = reduce(model, method, **options)
        counted = measure(LastMap(model) if maps else model, (224, 224)).macs
        assert counted == matcher.macs(method, options) == pytest.approx(share * matcher.whole), method


def test_baselines_are_always_there():
    assert named(["tome"]) == [("pool", {}), ("evit", {"fuse": False}), ("tome", {})]
    assert {name for name, _ in named(["all"])} == set(reducers())
    assert ("evit", {}) in named(["all"])


@pytest.mark.long
def test_rows(run, tmp_path, pictures):
    out = tmp_path / "rows.csv"
    options = ("--methods", "tome", "--share", 0.75, "--share", 0.5, "--images", pictures, "--out", out)
    done = run("bench", "reduce", MODEL, *options, *SMALL)
    assert done.exit_code == 0, done.output
    rows = results.read(out)
    facts = {(row.backend, row.metric): row.p50 for row in rows}
    names = list(dict.fromkeys(row.backend for row in rows))
    assert [name.split(",")[0] for name in names] == ["dense", *("pool", "evit", "tome") * 2]
    for name in names:
        assert facts[name, MACS] / facts["dense", MACS] == pytest.approx(facts[name, SHARE], abs=0.03)
        assert facts[name, FORWARD] > 0
        assert name.replace("(", "").split(",")[0] in done.output
    assert facts["dense", MAP] == pytest.approx(1, abs=1e-5)
    assert facts["dense", DRIFT] == 0
    assert facts["dense", AGREEMENT] == 1
    for one, other in zip(names[1:4], names[4:]):
        assert 1 > facts[one, MAP] > facts[other, MAP] > 0
        assert 0 < facts[one, DRIFT] < facts[other, DRIFT]
    head, lines = table(rows)
    assert [line[1] for line in lines] == names
    assert {len(line) for line in lines} == {len(head)}
    (again,) = chosen([], [], [names[-1]])
    assert again.name == names[-1]
    assert again.on(on_meta(timm.create_model(MODEL))).changes["reduce"]["method"] == "tome"


@pytest.mark.long
def test_what_a_method_cannot_reach_is_named():
    model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=3)
    found, wanting = contenders(model, (224, 224), ["dpcknn,keep=0.9"], [0.6], maps=False)
    assert [contender.mechanism.name.split(",")[0] for contender in found] == ["dense", "pool", "evit"]
    (line,) = wanting
    assert line.startswith("dpcknn,keep=0.9 at 60%: ")
    assert line.endswith("% of the multiply-adds is the least that this method leaves")


def test_refusals(refused):
    assert "method must be one of asvit," in refused("bench", "reduce", MODEL, "--methods", "tofu")
    assert "--r cannot stand beside --methods" in refused("bench", "reduce", MODEL, "--methods", "tome", "--r", 4)
    assert "--share needs --methods" in refused("bench", "reduce", MODEL, "--share", 0.5)
    assert "got 'evit,fuse'" in refused("bench", "reduce", MODEL, "--methods", "evit,fuse")
