"""Low-rank adapters (LoRA) for the layers of a student that a stage does not train in full, by the package peft."""

import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from terrazzo.errors import InputError, install_command

ATTENTION = ("qkv", "q_proj", "k_proj", "v_proj", "proj")
MLP = ("fc1", "fc1_g", "fc1_x", "fc2")


def add_adapters(student: Any, converted: Collection[int], rank: int, alpha: float) -> None:
    """Put adapters around the linear layers of a ViT's blocks, in place; they change nothing at first.

    Adapted are the layers of all MLPs, and the projections of attention in layers that are not converted. A file of
    weights with the ViT's own names loads into the adapted layers. peft freezes everything but its adapters.

    Args:
        student: The ViT.
        converted: The layers whose attention is trained in full.
        rank, alpha: An adapter adds alpha / rank * B A to a weight, where A and B have the rank.

    Raises:
        InputError: peft is not installed, or rank or alpha is not positive.
    """
    if type(rank) is not int or rank < 1 or not alpha > 0:
        raise InputError(f"rank must be a whole number of 1 or more, and alpha above 0, got {rank!r} and {alpha!r}")
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"trained='adapters' needs the package peft, which is not installed: {install_command('conversion')}"
        ) from error
    names = list(_adapted(student, converted))
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), student)
    for name in names:
        student.get_submodule(name).register_load_state_dict_pre_hook(_renamed)


def adapter_parameters(student: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all adapters."""
    return (parameter for name, parameter in student.named_parameters() if ".lora_" in name)


def merged(student: Any) -> Any:
    """A copy of an adapted ViT with the adapters added to the weights, and with the ViT's own layers and names."""
    from peft.tuners.lora import LoraLayer

    student = copy.deepcopy(student)
    for name, layer in [item for item in student.named_modules() if isinstance(item[1], LoraLayer)]:
        layer.merge(safe_merge=True)
        student.set_submodule(name, layer.get_base_layer())
    student.__dict__.pop("peft_config", None)
    return student


def _adapted(student: Any, converted: Collection[int]) -> Iterator[str]:
    """The names of the layers that get adapters."""
    for i, block in enumerate(student.blocks):
        # timm's EVA computes with the weights of this projection and does not call it, if it has a separate bias.
        left = ("qkv",) if getattr(block.attn, "q_bias", None) is not None else ()
        parts = () if i in converted else tuple(part for part in ATTENTION if part not in left)
        for module, names in (("attn", parts), ("mlp", MLP)):
            found = getattr(block, module)
            yield from (
                f"blocks.{i}.{module}.{name}" for name in names if type(getattr(found, name, None)) is nn.Linear
            )


def _renamed(layer: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Called before weights are loaded: an adapted layer has the plain layer as `base_layer`."""
    for name in ("weight", "bias"):
        if prefix + name in state:
            state[f"{prefix}base_layer.{name}"] = state.pop(prefix + name)
