"""M3ViT: a plain ViT for several tasks. Each task sends every token to a few of the experts in every second block.

Papers:
    M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator Co-design,
    NeurIPS 2022, arXiv 2210.14793.
    Edge-MoE: Memory-Efficient Multi-Task Vision Transformer Architecture with Task-level Sparsity via
    Mixture-of-Experts, ICCAD 2023, arXiv 2305.18691: `m3vit_tiny`.
Official code: github.com/VITA-Group/M3ViT, MIT licence in its own parts. The authors published no weights. Edge-MoE's
repository has the tensors of a trained `m3vit_tiny` as raw files, without a licence (`read_edge_moe`).

A task has a router in every block with experts, and all tasks share the experts. `model(x, task="depth")` is one pass
with the routers of this task. Without a task, the logits of all routers are averaged. The authors first train on
ImageNet with a single router; with equal routers, their mean is the same router.

Deviations: the final norm and the classifier (the authors' backbone has neither), images of any size, and equal
probabilities, among which the lowest expert comes first. Routers compute in float32 at least. Routing has no noise,
because the published training sets it to 0. The cross-task module (TAM) is left out: only training uses it, and its
code forbids commercial use.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import Block as PlainBlock
from torch import nn

from terrazzo.backbones._checks import check_image, sides, whole
from terrazzo.backbones._deit import NAMES
from terrazzo.backbones._head import TokenHead
from terrazzo.backbones._layers import init_linear, patch_conv
from terrazzo.backbones._plain import Plain, TokenStem
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Beside
from terrazzo.backbones._weights import any_prefix, rename
from terrazzo.errors import InputError
from terrazzo.kernels import grouped_linear
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import is_exporting
from terrazzo.kernels.grouped_linear import in_groups

__all__ = ["M3ViT", "UpHead"]

PATCH = 16
ROUTERS = ("multi_gate", "shared", "task")
_norm_layer = partial(LayerNorm, eps=1e-6)


class Routing(Beside):
    """How one forward pass routes its tokens.

    Attributes:
        grid: rows and columns of patches.
        task: the number of the task; None for the mean of all tasks.
        condition: (D,), what a router that all tasks share reads about the task; None if it reads only tokens.
        balance: the sum of the load-balancing losses so far, float32; None if nobody asks for it.
    """

    grid: tuple[int, int] = (0, 0)
    task: int | None = None
    condition: torch.Tensor | None = None
    balance: torch.Tensor | None = None


def top_k(probability: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, in falling order, and their places; the lower place comes first if two are equal."""
    if is_exporting():
        return probability.topk(k, dim=-1)
    value, place = probability.sort(dim=-1, descending=True, stable=True)  # topk leaves the order of ties open
    return value[:, :k], place[:, :k]


def _squared_variation(x: torch.Tensor) -> torch.Tensor:
    """The variance over the squared mean; 0 for a single number."""
    return x.var() / (x.mean().square() + 1e-10) if len(x) > 1 else x.new_zeros(())


def balance_loss(weight: torch.Tensor, index: torch.Tensor, experts: int) -> torch.Tensor:
    """How unequally experts are used: the squared variations of their importance and of their load, in float32.

    The importance of an expert is the sum of its weights, and has a gradient. Its load is its number of tokens.

    Args:
        weight, index: (N, k), the chosen experts' weights and numbers.

    Source: arXiv 2210.14793, section 3.2, and the authors' code.
    """
    spread = weight.new_zeros(len(weight), experts, dtype=torch.float32).scatter(1, index, weight.float())
    return _squared_variation(spread.sum(0)) + _squared_variation((spread > 0).sum(0).float())


class Router(nn.Module):
    """Logits of the experts, without bias: (N, C) to (N, E), in float32 at least."""

    def __init__(self, dim: int, experts: int, **factory):
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(dim, experts, **factory))
        nn.init.kaiming_uniform_(self.w_gate, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = accumulator(x)
        with without_autocast(x):
            return x.to(dtype) @ self.w_gate.to(dtype)


class ExpertLinear(nn.Module):
    """A linear layer of each expert."""

    def __init__(self, experts: int, channels_in: int, channels_out: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, channels_out, channels_in, **factory))
        self.bias = nn.Parameter(torch.zeros(experts, channels_out, **factory))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # the authors': bounded by 1 / sqrt(out * in)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Args:
        x: (rows, in), sorted by expert.
        offsets: where each expert's rows begin, and the number of rows.
        """
        return grouped_linear(x, self.weight, self.bias, offsets)

    def by_all(self, x: torch.Tensor) -> torch.Tensor:
        """All experts for all tokens: (N, in) to (N, E, out), as one product."""
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, tuple(self.bias.shape))

    def mixed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The sum over experts, each with a weight (N, E): (N, E, in) to (N, out), as one product."""
        matrix = self.weight.transpose(1, 2).flatten(0, 1)
        return (x * weight.unsqueeze(-1)).flatten(1) @ matrix + weight @ self.bias


class Experts(nn.Module):
    """The MLPs of the experts, and the weighted sum of the MLPs that a token has chosen.

    Pairs of token and expert are sorted by expert, so that each expert is one product (Edge-MoE's queues).
    """

    def __init__(self, dim: int, hidden: int, experts: int, **factory):
        super().__init__()
        self.htoh4 = ExpertLinear(experts, dim, hidden, **factory)
        self.h4toh = ExpertLinear(experts, hidden, dim, **factory)

    def forward(self, x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Args:
        x: (N, C).
        weight, index: (N, k), the chosen experts' weights and numbers.
        """
        experts = len(self.htoh4.bias)
        if is_exporting():  # every token goes through every expert; the weights of others are 0
            place = torch.arange(experts, device=x.device)
            spread = ((index.unsqueeze(-1) == place) * weight.unsqueeze(-1)).sum(1)  # N E
            return self.h4toh.mixed(F.gelu(self.htoh4.by_all(x)), spread.to(x.dtype))
        order, offsets = in_groups(index.flatten(), experts)
        # Not x[order // k]: the gradient of a permutation adds nothing up, so it is the same on every GPU run.
        rows = x.unsqueeze(1).expand(-1, index.shape[1], -1).flatten(0, 1).index_select(0, order)
        rows = self.h4toh(F.gelu(self.htoh4(rows, offsets)), offsets)
        back = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
        rows = rows.index_select(0, back).unflatten(0, tuple(index.shape))  # N k C
        return (rows * weight.unsqueeze(-1)).sum(1).to(rows.dtype)


class Mixture(nn.Module):
    """A mixture of experts in place of a block's MLP, with a router for each task or a router for all tasks.

    The weights of a token's k experts are their probabilities among all experts; they do not add up to 1.

    Source: arXiv 2210.14793, section 3.1.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int, gates: int | None, condition: int, **factory):
        """Args:
        gates: the number of routers, one for each task; None for a router that all tasks share.
        condition: the number of channels that a shared router reads about the task.
        """
        super().__init__()
        self.top_k = top_k
        self.experts = Experts(dim, hidden, experts, **factory)
        if gates is None:
            self.gate = Router(dim + condition, experts, **factory)
        else:
            self.gate = nn.ModuleList(Router(dim, experts, **factory) for _ in range(gates))

    def logits(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """(N, C) to (N, E), by the router of the task or the mean of all routers."""
        if isinstance(self.gate, Router):
            if routing.condition is not None:
                x = torch.cat([x, routing.condition.to(x.dtype).expand(x.shape[0], -1)], -1)
            return self.gate(x)
        if routing.task is not None:
            return self.gate[routing.task](x)
        return sum(gate(x) for gate in self.gate) / len(self.gate)

    def forward(self, x: torch.Tensor, routing: Routing, read: torch.Tensor | None = None) -> torch.Tensor:
        """Args:
        x: (B, N, C).
        read: what routers read, if not `x`.
        """
        logits = self.logits((x if read is None else read).flatten(0, 1), routing)
        weight, index = top_k(logits.softmax(-1), self.top_k)
        if routing.balance is not None:
            routing.balance = routing.balance + balance_loss(weight, index, logits.shape[-1])
        return self.experts(x.flatten(0, 1), weight, index).unflatten(0, tuple(x.shape[:2]))


class Block(PlainBlock):
    """timm's block, with an MLP or a mixture of experts."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, mixture: Mixture | None, ahead: bool, **factory):
        """Args:
        ahead: routers read the block's input, not the input of the mixture.
        """
        super().__init__(dim, num_heads, qkv_bias=True, drop_path=drop_path, norm_layer=_norm_layer, **factory)
        self.ahead = ahead
        if mixture is not None:
            self.mlp = mixture

    def forward(self, x: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """Args:
        routing: a `Routing`, whose loss grows if it is asked for; None for the mean of all tasks.
        """
        if not isinstance(self.mlp, Mixture):
            return super().forward(x)
        read = x if self.ahead else None
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x), Routing() if routing is None else routing, read))


class TaskRepresentation(nn.Module):
    """What a shared router reads about a task: (T,), 1 at the task's number, to (D,)."""

    def __init__(self, tasks: int, dim: int, **factory):
        super().__init__()
        self.fc1 = nn.Linear(tasks, dim, **factory)
        self.fc2 = nn.Linear(dim, dim, **factory)
        self.norm = _norm_layer(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc2(F.gelu(self.fc1(x))))


class M3ViT(Plain):
    """A plain ViT whose blocks 1, 3, 5, ... have experts, routed by task.

    `forward`, `forward_features` and `forward_intermediates` take `task`, a name among `tasks`; None is the mean of all
    routers. Maps are not normalised unless `norm_outputs`, as in the authors' model.
    """

    no_decay = ("cls_token", "pos_embed")
    gives_tokens = True

    def __init__(
        self,
        tasks: Sequence[str] = ("segmentation", "depth"),
        embed_dim: int = 384,
        num_heads: int = 12,
        depth: int = 12,
        experts: int = 16,
        top_k: int = 4,
        expert_hidden: int = 384,
        router: str = "multi_gate",
        task_dim: int = 64,
        gate_input_ahead: bool = False,
        img_size: int | tuple[int, int] = (480, 640),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_outputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        tasks: the names of the tasks, in the order of their routers.
        experts, top_k: the number of experts in a block, and how many of them see a token.
        expert_hidden: the channels of an expert's hidden layer.
        router: "multi_gate" for a router for each task (the published model), "shared" for one router that does not
            know the task, "task" for one router that also reads a learned vector of the task.
        task_dim: the length of that vector.
        gate_input_ahead: routers read the block's input, not the normalised input of the experts.
        img_size: height and width (or the side) of the images that the positions are made for; for others they are
            resized.

        Raises:
            InputError: there is no task, or a name twice, or `router` or `top_k` is not one of the choices.
        """
        experts, top_k = whole("experts", experts), whole("top_k", top_k)
        if isinstance(tasks, str) or not tasks or len({*tasks}) < len(tasks):
            raise InputError(f"tasks must be different names, at least one, got {tasks!r}")
        if router not in ROUTERS:
            raise InputError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
        if not 1 <= top_k <= experts:
            raise InputError(f"top_k must be 1 to the {experts} experts, got {top_k}")
        factory = dict(device=device, dtype=dtype)
        gates, condition = (len(tasks) if router == "multi_gate" else None), (task_dim if router == "task" else 0)
        rates = calculate_drop_path_rates(drop_path_rate, depth)

        def mixture(i: int) -> Mixture | None:
            return Mixture(embed_dim, expert_hidden, experts, top_k, gates, condition, **factory) if i % 2 else None

        super().__init__(
            TokenStem(
                patch_conv(in_chans, embed_dim, PATCH, **factory),
                embed_dim,
                tuple(-(-side // PATCH) for side in sides("img_size", img_size)),
                **factory,
            ),
            [Block(embed_dim, num_heads, rates[i], mixture(i), gate_input_ahead, **factory) for i in range(depth)],
            embed_dim,
            PATCH,
            norm_layer=_norm_layer,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="avg",
            drop_rate=drop_rate,
            norm_outputs=norm_outputs,
            **factory,
        )
        self.head = TokenHead(embed_dim, num_classes, global_pool, drop_rate, **factory)
        self.tasks = tuple(tasks)
        if condition:
            self.gate_task_represent = TaskRepresentation(len(tasks), condition, **factory)
        self.apply(init_linear)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), "stem": r"^(?:stem|gate_task_represent)"}

    def routing(self, task: str | None = None, balance: bool = False) -> Routing:
        """The state of a forward pass: `model(x, routing=routing)`.

        Args:
            balance: sum up the load-balancing losses of all routers in `routing.balance`.

        Raises:
            InputError: the model does not have the task.
        """
        if task is not None and task not in self.tasks:
            raise InputError(f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        number = None if task is None else self.tasks.index(task)
        found, parameter = Routing(task=number), self.stem.cls_token
        if balance:
            found.balance = torch.zeros((), device=parameter.device)
        if hasattr(self, "gate_task_represent"):
            count = len(self.tasks)
            known = [1 / count] * count if number is None else [float(i == number) for i in range(count)]
            found.condition = self.gate_task_represent(
                torch.tensor(known, device=parameter.device, dtype=parameter.dtype)
            )
        return found

    def keep_task(self, task: str) -> "M3ViT":
        """Remove the routers of all other tasks, in place; then the model routes for this task, also without `task`."""
        number = self.routing(task).task
        for block in self.blocks:
            if isinstance(block.mlp, Mixture) and isinstance(block.mlp.gate, nn.ModuleList):
                block.mlp.gate = nn.ModuleList([block.mlp.gate[number]])
        if hasattr(self, "gate_task_represent"):
            fc1 = self.gate_task_represent.fc1
            fc1.weight, fc1.in_features = nn.Parameter(fc1.weight[:, number : number + 1].detach().clone()), 1
        self.tasks = (task,)
        return self

    def begin(
        self, x: torch.Tensor, task: str | None = None, routing: Routing | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Args:
        task: the name of the task.
        routing: the result of `routing`, in place of `task`.
        """
        routing = self.routing(task) if routing is None else routing
        return self.stem(x, routing), routing

    def to_map(self, x: torch.Tensor, state: Routing) -> torch.Tensor:
        return x[:, 1:].unflatten(1, state.grid)

    def to_features(self, x: torch.Tensor, state: Routing) -> torch.Tensor:
        return self.norm(x)

    def forward_features(
        self, x: torch.Tensor, task: str | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """(B, in_chans, H, W) to normalised tokens (B, 1 + H/16 W/16, C); arguments as in `begin`."""
        check_image(x, self.in_chans)
        x, state = self.begin(x, task, routing)
        for block in self.blocks:
            x = self.run_unit(block, x, state)
        return self.to_features(x, state)

    def forward(self, x: torch.Tensor, task: str | None = None, routing: Routing | None = None) -> torch.Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes); arguments as in `begin`."""
        return self.forward_head(self.forward_features(x, task, routing))


class UpHead(nn.Module):
    """The authors' decoder of a task: five convolutions that bring a map of stride 16 back to the size of the image.

    Source: arXiv 2210.14793, and the authors' code (progressive up-sampling, as in SETR, arXiv 2012.15840).
    """

    def __init__(self, dim: int, channels: int, width: int = 256, **factory):
        """Args:
        channels: the channels of the output: classes, or 1 for a depth.
        """
        super().__init__()
        self.norm = _norm_layer(dim, **factory)
        for i in range(4):
            self.add_module(f"conv_{i}", nn.Conv2d(width if i else dim, width, 3, padding=1, **factory))
            self.add_module(f"syncbn_fc_{i}", nn.BatchNorm2d(width, **factory))
        self.conv_4 = nn.Conv2d(width, channels, 1, **factory)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The last convolution's input: (B, C, h, w), not normalised, to (B, width, 8 h, 8 w)."""
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for i in range(4):
            x = F.relu(getattr(self, f"syncbn_fc_{i}")(getattr(self, f"conv_{i}")(x)))
            if i < 3:
                x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, channels, 16 h, 16 w)."""
        return F.interpolate(self.conv_4(self.features(x)), scale_factor=2, mode="bilinear")


# -- Others' weights.

# Edge-MoE's names; `l3_` stands for block 3. Its routers are transposed.
_EDGE_MOE = [
    (r"^patch_embed_", "patch_embed.proj."),
    (r"^l(\d+)_w_gate_T_task(\d+)$", r"blocks.\1.mlp.gate.\2.w_gate"),
    (r"^l(\d+)_(qkv|attn_proj)_", r"blocks.\1.attn.\2."),
    (r"^l(\d+)_(norm\d)_", r"blocks.\1.\2."),
    (r"^l(\d+)_(fc\d)_", r"blocks.\1.mlp.\2."),
    (r"^l(\d+)_(htoh4|h4toh)_", r"blocks.\1.mlp.experts.\2."),
    (r"\.attn\.attn_proj\.", ".attn.proj."),
]


def read_edge_moe(folder: str | Path) -> dict[str, torch.Tensor]:
    """The raw files of Edge-MoE (`weights/<name>.float32.bin`), by name and flat; `load_state_dict` takes them."""
    found = {}
    for path in sorted(Path(folder).glob("*.float32.bin")):
        found[path.name.removesuffix(".float32.bin")] = torch.from_numpy(np.fromfile(path, "<f4"))
    return found


def _from_edge_moe(files: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Edge-MoE's files under the authors' names, in the shapes of `own`, a state dict with these names.

    The class token is already part of its position, so it is 0. Files that are no parameters are left out.
    """
    found = {name: value for name, value in rename(files, _EDGE_MOE).items() if name in own}
    for name, value in found.items():
        shape = own[name].shape
        if value.numel() != shape.numel():
            raise InputError(f"{name} has {value.numel()} numbers in Edge-MoE's files, and {tuple(shape)} in the model")
        turned = name.endswith("w_gate")
        found[name] = value.reshape(shape[::-1]).t().contiguous() if turned else value.reshape(shape)
    return found | {"cls_token": torch.zeros(own["cls_token"].shape)}


def _resized(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Positions of a square grid, resized bilinearly as the authors do with DeiT's; others stay as they are."""
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1 or positions.shape[1] == 1 + grid[0] * grid[1]:
        return positions
    patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], 1)


_OWN = re.compile(r"^(norm\d*|head)\.")  # the authors' backbone has no final norm and no classifier


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or Edge-MoE's files (`read_edge_moe`), into a state dict of `model`.

    A single router, as after the authors' pretraining, becomes the router of every task. Norm and classifier stay the
    model's if the checkpoint has none.
    """
    own = model.state_dict()
    back = {re.sub(r"^stem\.patches\.", "patch_embed.proj.", name).removeprefix("stem."): own[name] for name in own}
    if any(re.match(r"l\d+_", name) for name in state_dict):
        state_dict = _from_edge_moe(state_dict, back)
    found = {name: value for name, value in own.items() if _OWN.match(name)} | rename(state_dict, NAMES)
    for name in own:
        single = re.sub(r"\.gate\.\d+\.w_gate$", ".gate.w_gate", name)
        if name not in found and single in found:
            found[name] = found[single]
    found = {name: value for name, value in found.items() if name in own or not name.endswith(".gate.w_gate")}
    if "stem.pos_embed" in found:
        found["stem.pos_embed"] = _resized(found["stem.pos_embed"], model.stem.grid)
    return found


def _cfg(size: tuple[int, int], *notes: str) -> dict[str, Any]:
    return imagenet_cfg(
        None,
        input_size=(3, *size),
        pool_size=(size[0] // PATCH, size[1] // PATCH),
        first_conv="stem.patches",
        origin_url="https://github.com/VITA-Group/M3ViT",
        paper_name="M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning",
        paper_ids="arXiv:2210.14793",
        description="the authors published no weights",
        notes=("published top-1: none", *notes),
    )


default_cfgs = generate_default_cfgs(
    {
        "m3vit_tiny": _cfg((128, 256), "Edge-MoE (arXiv:2305.18691), Cityscapes"),
        "m3vit_small": _cfg((480, 640), "published for NYUD-v2: mIoU 45.6"),
    }
)

register_variants(
    __name__,
    M3ViT,
    {
        "m3vit_tiny": dict(embed_dim=192, num_heads=3, top_k=2, expert_hidden=384, img_size=(128, 256)),
        "m3vit_small": dict(embed_dim=384, num_heads=12, top_k=4, expert_hidden=384, img_size=(480, 640)),
    },
    out_indices=(2, 5, 8, 11),
)
