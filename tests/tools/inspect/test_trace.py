"""The traced operations of a forward pass equal the module's operations."""

import torch
from torch import nn

from terrazzo.tools.inspect.trace import trace


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x)).flatten(1)[:, None].transpose(1, 2)  # views move no data
        return x * x.new_ones(1).expand(7, 1)[:1]


def test_operations():
    """In float32, for 5 x 2 pixels, the convolution reads 30 numbers and writes 40."""
    model = nn.Sequential(Block(), nn.Identity())
    conv, relu, ones, product = trace(model, (5, 2))
    assert (conv.layer, conv.kind) == ("0.conv", "Conv2d")
    assert (conv.flops, conv.activations) == (2 * 40 * 3, 40)
    assert (conv.read, conv.written) == (4 * (30 + 12), 4 * 40)
    assert (relu.layer, relu.flops, relu.read, relu.written) == ("0.act", 0, 160, 160)
    assert (ones.layer, product.layer, product.kind) == ("0", "0", "Block")
    assert (product.read, product.written) == (160 + 4, 160)


def test_what_lies_once_in_memory_is_counted_once():
    class Square(nn.Module):
        def forward(self, x):
            return x * x, x + x[:1].expand(9, -1, -1, -1)

    square, total = trace(Square(), (2, 2), batch=9)
    assert square.read == 4 * 9 * 12
    assert total.read == 4 * (9 * 12 + 12)


def test_leaves_no_hooks_behind():
    model = Block()
    trace(model, 4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
