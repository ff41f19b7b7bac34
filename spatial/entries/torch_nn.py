"""PyTorch's modules that work on single positions, or only call others."""

from torch import nn

from terrazzo.spatial._entries import OWN, Entry


def _check_flatten(module: nn.Flatten) -> str | None:
    return None if module.start_dim == 1 and module.end_dim == -1 else "may join rows and columns"


_ACTIVATIONS = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU "
    "Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
)

ENTRIES = {
    **dict.fromkeys(_ACTIVATIONS.split(), OWN),
    **dict.fromkeys(("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"), OWN),
    **dict.fromkeys(("Identity", "Linear", "Dropout", "Dropout2d"), OWN),
    # After a pooling there are no positions. A map that is flattened fails in the layer behind, by its channels.
    "Flatten": Entry(check=_check_flatten),
}
