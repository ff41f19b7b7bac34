"""Small teachers of conversions, as files of weights."""

from pathlib import Path

import timm
import torch


def teacher_file(folder: Path, name: str, sharpness: float = 1.0, **options: object) -> str:
    """A file of a ViT's random weights; a sharpness above 1 gives attention that is not flat."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(sharpness)
            block.attn.proj.weight.mul_(1 if sharpness == 1 else 12)
    file = folder / "teacher.pth"
    torch.save(model.state_dict(), file)
    return str(file)
