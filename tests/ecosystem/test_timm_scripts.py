"""timm's train.py and validate.py, which its wheel lacks: what these scripts do with `--device-modules terrazzo`.

train.py imports the modules of that option before it makes the model. Both scripts below take timm's own steps, in
processes that have not imported terrazzo.
"""

import numpy as np
import pytest
from PIL import Image
from support.processes import run_code

pytestmark = pytest.mark.slow

TRAIN = """
import argparse, importlib, timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--output")
parser.add_argument("--device-modules", nargs="+")
args = parser.parse_args()
assert not timm.is_model(args.model)
for module in args.device_modules:
    importlib.import_module(module)
model = timm.create_model(args.model, num_classes=2, drop_path_rate=0.1)
config = resolve_data_config(dict(img_size=64), model=model)
loader = create_loader(
    create_dataset("", root=args.data_dir, split="train", is_training=True), input_size=(3, 64, 64), batch_size=2,
    is_training=True, use_prefetcher=False, num_workers=0, mean=config["mean"], std=config["std"],
)
optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8)
scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2)
saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=args.output, recovery_dir=args.output)
for images, target in loader:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), target).backward()
    optimizer.step()
scheduler.step(1)
saver.save_checkpoint(0, metric=1.0)
torch.save(model.eval()(torch.ones(1, 3, 64, 64)), args.output + "/logits.pth")
"""

# The line of docs/ecosystem.md: `python -c "import terrazzo, runpy; runpy.run_path(...)"`.
VALIDATE = """
import sys, runpy, terrazzo
sys.argv = ["validate.py", *sys.argv[1:]]
runpy.run_path("validate.py", run_name="__main__")
"""

SCRIPT = """
import argparse, timm, torch
from timm.models import load_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--checkpoint")
args = parser.parse_args()
assert __name__ == "__main__"
model = timm.create_model(args.model, num_classes=2).eval()
load_checkpoint(model, args.checkpoint)
assert torch.equal(model(torch.ones(1, 3, 64, 64)), torch.load("out/logits.pth", weights_only=True))
print("equal")
"""


@pytest.mark.parametrize("name", ["s2aformer_mini", "dinat_mini", "roma_tiny"])
def test_trains_and_validates(name, tmp_path):
    random = np.random.default_rng(0)
    for number in range(4):
        folder = tmp_path / "data" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (70, 70, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "out").mkdir()
    options = ["--model", name, "--output", tmp_path / "out", "--device-modules", "terrazzo"]
    done = run_code(TRAIN, "--data-dir", tmp_path / "data", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "validate.py").write_text(SCRIPT)
    checkpoint = next((tmp_path / "out").glob("last*"))
    done = run_code(VALIDATE, "--model", name, "--checkpoint", checkpoint, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["equal"]), done.stderr[-2000:]
