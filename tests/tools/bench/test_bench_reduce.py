"""`terrazzo bench reduce` gives rows and a table for every r."""

import pytest

from terrazzo.tools import results
from terrazzo.tools.bench.reduction import MACS, MAP, POOLED, table

SMALL = ("--seconds", 0.01, "--batch", 1)


@pytest.mark.long
def test_more_merged_tokens_cost_less_and_drift_further(run, tmp_path, picture):
    out = tmp_path / "rows.csv"
    options = ("--r", 4, "--r", 0.35, "--blocks", "3,6", "--images", picture, "--out", out)
    done = run("bench", "reduce", "vit_tiny_patch16_224", *options, *SMALL)
    assert done.exit_code == 0, done.output
    rows = results.read(out)
    names = ["nothing", "4 in blocks 3, 6", "35% in blocks 3, 6"]
    assert list(dict.fromkeys(row.backend for row in rows)) == names
    found = {metric: [row.p50 for row in rows if row.metric == metric] for metric in (MACS, POOLED, MAP, "forward")}
    assert found[MACS] == sorted(found[MACS], reverse=True)
    assert len(set(found[MACS])) == 3
    assert found[POOLED][0] == found[MAP][0] == pytest.approx(1, abs=1e-5)
    assert found[MAP][0] > found[MAP][1] > found[MAP][2] > 0
    assert 1 >= found[POOLED][1] >= found[POOLED][2] > 0
    head, lines = table(rows)
    assert [line[0] for line in lines] == names
    assert lines[0][-1] == "1.00 x"
    assert len(head) == len(lines[0])
    assert "35% in blocks 3, 6" in done.output


@pytest.mark.long
def test_refusals(run, refused, tmp_path):
    assert "not a folder" in refused("bench", "reduce", "vit_tiny_patch16_224", "--out", tmp_path / "no" / "x.csv")
    assert "--blocks takes numbers" in refused("bench", "reduce", "vit_tiny_patch16_224", "--blocks", "3,x")
    result = run("bench", "reduce", "resnet10t", *SMALL)
    assert result.exit_code == 2
    assert "plain VisionTransformer" in result.stderr
    assert run("bench", "reduce").exit_code == 2
