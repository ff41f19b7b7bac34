"""What every framework's test does: a training step that reaches the backbone, and a reload with equal output."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def step(loss: Tensor, backbone: nn.Module, unused: str = "") -> None:
    """Backward and a step of SGD; every parameter of the backbone that can be trained gets a finite gradient.

    Args:
        unused: The beginning of the names of parameters that the framework does not use.
    """
    assert torch.isfinite(loss)
    loss.backward()
    trained = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    gradients = {name: p.grad for name, p in trained if not (unused and name.startswith(unused))}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())
    torch.optim.SGD(backbone.parameters(), lr=1e-3).step()


def reloads(model: nn.Module, make: Callable[[], nn.Module], run: Callable[[nn.Module], object], file: Path) -> None:
    """A new model, with the weights from a file, gives the same output; before, its output differs."""
    model.eval()
    torch.save(model.state_dict(), file)
    again = make().eval()
    with torch.no_grad():
        wanted = leaves(run(model))
        assert not equal(leaves(run(again)), wanted), "a new model has the same weights: this proves nothing"
        again.load_state_dict(torch.load(file, weights_only=True))
        assert equal(leaves(run(again)), wanted)


def leaves(output: object) -> list[Tensor]:
    """The tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, list | tuple) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    assert wanted
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted))
