"""Official checkpoints have the names of mmdet 2."""

from torch import Tensor, nn

from terrazzo.backbones._weights import rename


def take_official_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *args) -> None:
    """A load hook that applies the (regular expression, replacement) pairs of `module.official_names` to own names."""
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update({prefix + name: value for name, value in rename(own, module.official_names).items()})
