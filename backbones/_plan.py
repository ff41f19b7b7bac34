"""`terrazzo.conversion_plan`: which attention layers of a ViT another mechanism replaces best, measured on images.

Only shared copies of the model run, so the model itself stays as it is. A layer's replacement changes nothing in front
of it: a pass with replaced layers begins at the first of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from terrazzo.backbones._checks import number, whole
from terrazzo.backbones._divergence import divergence, judged
from terrazzo.backbones._hosts import check_host, kind_of, make_host, new_mixers, unwrapped
from terrazzo.backbones._record import defaults, plain
from terrazzo.backbones._shared import shared_copy
from terrazzo.backbones._tokens import Reducer
from terrazzo.backbones.mixers import Mixer, mixer_class
from terrazzo.errors import InputError

Batches = torch.Tensor | Iterable[torch.Tensor]


@dataclass(frozen=True)
class Replacement:
    """What replacing the attention of one layer alone does, over all images.

    Attributes:
        layer: Its index, from 0.
        divergence: KL in nats of the logits to those of the model with attention, mean over images; of the final
            tokens, normalised over channels, if the model has no classifier (`terrazzo.backbones._divergence`).
        attention_error: Norm of the change of the layer's output (after its projection, before layer scale), divided by
            the norm of the output.
        prefix_error: The same for the tokens in front (class token, registers) alone; None if there are none.
        token_error: The relative error of the model's final tokens, by the same formula.
        token_cosine: The mean cosine of the final tokens.
        cumulative: The divergence with this layer and all layers before it in the plan replaced; None if not measured.
    """

    layer: int
    divergence: float
    attention_error: float
    prefix_error: float | None
    token_error: float
    token_cosine: float
    cumulative: float | None = None


COLUMNS = ("layer", "KL alone", "KL together", "attention error", "front tokens", "final error", "final cosine")
"""The heads of a plan's table. "KL together" is with all layers above, "front tokens" their attention error."""


@dataclass(frozen=True)
class Plan:
    """Layers in the order in which to replace them.

    Attributes:
        mixer: The mechanism.
        rows: A row for each layer that could be replaced, the least divergence first.
        layers: The layers to replace within the limits that were given, in the order of `rows`.
        of: What the divergences compare, "logits" or "features".
        images: Number of images.
    """

    mixer: str
    rows: tuple[Replacement, ...]
    layers: tuple[int, ...]
    of: str
    images: int

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text, under `COLUMNS`."""
        return [
            (
                str(row.layer),
                f"{row.divergence:.3g}",
                "" if row.cumulative is None else f"{row.cumulative:.3g}",
                f"{row.attention_error:.3f}",
                "" if row.prefix_error is None else f"{row.prefix_error:.3f}",
                f"{row.token_error:.3f}",
                f"{row.token_cosine:.4f}",
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        lines = [COLUMNS, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
        return "\n".join([f"{self.mixer} in place of attention, {self.images} images, KL of {self.of}", *table])


def conversion_plan(
    model: nn.Module,
    mixer: str,
    images: Batches,
    budget: int | None = None,
    max_kl: float | None = None,
    greedy: bool = False,
    teacher: nn.Module | None = None,
    **options: Any,
) -> Plan:
    """Measure which layers of a plain ViT of timm a mechanism replaces with the least change of the model's output.

    Each layer is replaced alone, and the layers are ordered by the divergence of the output. Then they are replaced
    one after another in this order, as long as the limits allow. A layer that already has this mixer with these
    options keeps the mixer's weights, so a plan can follow a training. Other mixers stay where they are. The model does
    not change. Images run through the model two times, or once for each replaced layer with `greedy`.

        print(terrazzo.conversion_plan(model, "hedgehog", images, budget=6))

    Args:
        model: What `terrazzo.convert_attention` takes, without a token reduction.
        mixer: The mechanism, one of `terrazzo.mixers()`.
        images: Batches (B, 3, H, W), or one batch; about 256 images, prepared as for the model.
        budget: The number of layers to replace at most; None for all.
        max_kl: The largest divergence to accept with all these layers replaced; None for any.
        greedy: Choose each next layer by trying all remaining layers beside those already chosen. This costs more, and
            is made for models with few layers or for small budgets.
        teacher: The model before training, if training changed more than the mixers' own weights: the divergences are
            to its output, and layers without the mixer have its attention. None for the model itself with attention.
        **options: Options of the mechanism.

    Raises:
        InputError: The model, the mixer, an option or a limit is not valid, there are no images, or they are so small
            that the mechanism computes softmax attention in all layers.
    """
    return measured(model, mixer, images, budget, max_kl, greedy, teacher, options)[0]


def measured(
    model: nn.Module,
    mixer: str,
    images: Batches,
    budget: int | None,
    max_kl: float | None,
    greedy: bool,
    teacher: nn.Module | None,
    options: Mapping[str, Any],
    together: bool = True,
) -> tuple[Plan, dict[int, Mixer]]:
    """See `conversion_plan`; also the mixers that were measured, by layer. The model's own are among them.

    Args:
        together: Whether to measure cumulative divergences, even if no limit needs them.
    """
    mixers = candidates(model, mixer, options)
    model = unwrapped(model)
    budget, max_kl = _limits(budget, max_kl, len(mixers))
    runs = _Runs(model, mixers, None if teacher is None else _checked(teacher, "a teacher"))
    batches = _Batches(images, next(model.parameters()))
    if greedy:
        rows, layers = _greedy(runs, batches, budget, max_kl)
    else:
        rows, layers = _ordered(runs, batches, budget, max_kl, together)
    of = "logits" if runs.model.num_classes > 0 else "features"
    return Plan(mixer, tuple(rows), tuple(layers), of, batches.images), mixers


def _checked(model: nn.Module, verb: str) -> Any:
    model = unwrapped(model)
    check_host(model, verb)
    if kind_of(model) is not type(model) and type(model.reducer) is not Reducer:
        raise InputError(
            "a plan compares tokens one by one, and this model merges, drops or reorders them: plan first, and call "
            "terrazzo.reduce afterwards"
        )
    if next(model.parameters()).is_meta:
        raise InputError("the model is on the meta device and has no weights: a plan needs a trained model")
    return model


def candidates(model: nn.Module, mixer: str, options: Mapping[str, Any]) -> dict[int, Mixer]:
    """A mixer for each layer that a plan decides about: the layers that have attention, or this mixer already.

    Raises:
        InputError: the model cannot be planned, or the mixer or an option is not valid.
    """
    model = _checked(model, "converted")
    if mixer == "softmax":
        raise InputError("'softmax' replaces nothing: name another mechanism, or layers to restore")
    own = {layer: getattr(block.attn, "mixer", None) for layer, block in enumerate(model.blocks)}
    known = defaults(mixer_class(mixer))
    same = known | plain(dict(options))
    kept = {i: m for i, m in own.items() if m is not None and m.name == mixer and known | plain(m.options) == same}
    free = [i for i, m in own.items() if i not in kept and (m is None or m.name == mixer)]
    found = kept | new_mixers(model, mixer, free, options)
    if not found:
        raise InputError("every layer has another mixer: restore layers first, with the mixer 'softmax'")
    return dict(sorted(found.items()))


def _limits(budget: int | None, max_kl: float | None, count: int) -> tuple[int, float]:
    if budget is not None and not 1 <= whole("budget", budget) <= count:
        raise InputError(f"budget must be 1 to {count}, the number of layers that can be converted, got {budget}")
    if max_kl is not None and number("max_kl", max_kl) < 0:
        raise InputError(f"max_kl must be 0 or more, got {max_kl}")
    return count if budget is None else int(budget), math.inf if max_kl is None else float(max_kl)


class _Batches:
    """Images that can be read more than once, on a model's device and in its dtype."""

    def __init__(self, images: Batches, like: torch.Tensor):
        images = [images] if isinstance(images, torch.Tensor) else images
        if not isinstance(images, Iterable):
            raise InputError(f"images must be batches (B, 3, H, W), got {images!r}")
        self.found = list(images) if iter(images) is images else images  # a generator can be read once
        self.like, self.images = like, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.images = 0
        for batch in self.found:
            if not isinstance(batch, torch.Tensor):
                raise InputError(f"images must be batches (B, 3, H, W) of tensors, got {type(batch).__name__}")
            self.images += len(batch)
            yield batch.to(self.like.device, self.like.dtype)
        if not self.images:
            raise InputError("images holds no image: give at least one batch (B, 3, H, W)")


@dataclass
class _Wanted:
    """What the model with attention computes for a batch.

    Attributes:
        entered: The input of each block, and the state beside it.
        attended: The output of each layer's attention.
        tokens: The final tokens.
        judged: What divergences compare.
    """

    entered: list[tuple[torch.Tensor, Any]]
    attended: list[torch.Tensor]
    tokens: torch.Tensor
    judged: torch.Tensor


class _Runs:
    """Runs a model with the attention of some layers replaced."""

    def __init__(self, model: Any, mixers: Mapping[int, Mixer], teacher: Any | None):
        if teacher is not None:
            check_alike(model, teacher)
        self.model = _host(model)
        self.teacher = None if teacher is None else _host(teacher)
        self.mixers = mixers
        self.seen: dict[int, torch.Tensor] = {}
        self.mixed, self.dense = {}, {}
        for layer, mixer in mixers.items():
            self.mixed[layer] = shared_copy(self.model.blocks[layer].attn)
            self.mixed[layer].mixer = shared_copy(mixer).eval()
            of = self.model if self.teacher is None else self.teacher
            self.dense[layer] = shared_copy(of.blocks[layer].attn)
            self.dense[layer].mixer = None
        for model in filter(None, (self.model, self.teacher)):
            self._watch({layer: block.attn for layer, block in enumerate(model.blocks)})
        self._watch(self.mixed)
        self._watch(self.dense)

    def _watch(self, attns: Mapping[int, nn.Module]) -> None:
        for layer, attn in attns.items():
            attn.register_forward_hook(lambda module, given, out, layer=layer: self.seen.__setitem__(layer, out))

    def wanted(self, images: torch.Tensor) -> _Wanted:
        """What the model with attention computes."""
        self._take(())
        entered, tokens = self._whole(self.model, images)
        if self.teacher is not None:
            _, tokens = self._whole(self.teacher, images)
        attended = [self.seen[layer] for layer in range(len(self.model.blocks))]
        of = self.model if self.teacher is None else self.teacher
        grid, prefix = entered[0][1].grid, entered[0][1].prefix
        reasons = [mixer.dense(grid, prefix) for mixer in self.mixers.values()]
        if all(reason is not None for reason in reasons):
            raise InputError(
                f"{next(iter(self.mixers.values())).name!r} computes softmax attention on images so small "
                f"({reasons[0]}), so there is nothing to compare: give larger images"
            )
        return _Wanted(entered, attended, tokens, judged(of, tokens))

    def replaced(self, layers: Sequence[int], wanted: _Wanted) -> torch.Tensor:
        """The final tokens with some layers replaced; `seen` has their attention's output."""
        self._take(layers)
        first = min(layers)
        x, state = wanted.entered[first]
        state = state.copy()
        for block in self.model.blocks[first:]:
            x = block(x, state)
        return self.model._features(x, state)

    def _take(self, layers: Sequence[int]) -> None:
        for layer in self.mixers:
            self.model.blocks[layer].attn = (self.mixed if layer in layers else self.dense)[layer]

    def _whole(self, model: Any, images: torch.Tensor) -> tuple[list[tuple[torch.Tensor, Any]], torch.Tensor]:
        x, state = model._begin(images, maps=False)
        entered = []
        for block in model.blocks:
            entered.append((x, state.copy()))
            x = block(x, state)
        return entered, model._features(x, state)


def check_alike(model: Any, teacher: Any) -> None:
    own, other = ((len(x.blocks), x.embed_dim, x.num_classes) for x in (model, teacher))
    if own != other:
        raise InputError(
            f"the teacher has {other[0]} layers, {other[1]} channels and {other[2]} classes, and the model {own[0]}, "
            f"{own[1]} and {own[2]}: they must be equal"
        )
    for layer, (a, b) in enumerate(zip(model.blocks, teacher.blocks)):
        own, other = (
            {key: x.shape for key, x in block.attn.state_dict().items() if not key.startswith("mixer.")}
            for block in (a, b)
        )
        if own != other:
            raise InputError(f"the attention of layer {layer} has other parameters in the teacher than in the model")


def _host(model: Any) -> Any:
    copied = shared_copy(model)
    make_host(copied)
    return copied.eval()


class _Sums:
    """Sums over images for one set of replaced layers."""

    def __init__(self):
        self.squares = {name: [0.0, 0.0] for name in ("attention", "prefix", "tokens")}
        self.cosine = self.divergence = 0.0
        self.tokens = self.images = 0

    def add(self, runs: _Runs, layers: Sequence[int], wanted: _Wanted) -> None:
        """Run a batch with these layers replaced."""
        tokens = runs.replaced(layers, wanted)
        layer, prefix = layers[0], wanted.entered[0][1].prefix
        found, target = runs.seen[layer], wanted.attended[layer]
        self._squares("attention", found, target)
        self._squares("prefix", found[:, :prefix], target[:, :prefix])
        self._squares("tokens", tokens, wanted.tokens)
        self.cosine += torch.cosine_similarity(tokens.double(), wanted.tokens.double(), dim=-1).sum().item()
        self.tokens += tokens.shape[:-1].numel()
        apart = divergence(judged(runs.model, tokens).double(), wanted.judged.double())
        self.divergence += apart.flatten(1).mean(1).sum().item() if apart.dim() > 1 else apart.sum().item()
        self.images += len(tokens)

    def _squares(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        self.squares[name][0] += (found - wanted).double().square().sum().item()
        self.squares[name][1] += wanted.double().square().sum().item()

    def error(self, name: str) -> float | None:
        """A relative error; None if there is nothing to compare."""
        off, all_ = self.squares[name]
        return math.sqrt(off / all_) if all_ > 0 else None

    @property
    def mean(self) -> float:
        """The mean divergence; infinite if an output is not finite, so that it comes last."""
        found = self.divergence / self.images
        return found if math.isfinite(found) else math.inf

    def row(self, layer: int) -> Replacement:
        return Replacement(
            layer,
            self.mean,
            self.error("attention") or 0.0,
            self.error("prefix"),
            self.error("tokens") or 0.0,
            self.cosine / self.tokens,
        )


@torch.no_grad()
def _sweep(runs: _Runs, batches: _Batches, sets: Sequence[Sequence[int]]) -> list[_Sums]:
    """The sums for several sets of replaced layers, from one reading of the images."""
    sums = [_Sums() for _ in sets]
    for images in batches:
        wanted = runs.wanted(images)
        for layers, found in zip(sets, sums):
            found.add(runs, layers, wanted)
    return sums


def _alone(runs: _Runs, batches: _Batches) -> list[Replacement]:
    layers = list(runs.mixers)
    sums = _sweep(runs, batches, [(layer,) for layer in layers])
    rows = [found.row(layer) for layer, found in zip(layers, sums)]
    return sorted(rows, key=lambda row: row.divergence)


def _ordered(
    runs: _Runs, batches: _Batches, budget: int, max_kl: float, together: bool
) -> tuple[list[Replacement], list[int]]:
    """Order by the divergence of each layer alone, then cut by the limits."""
    rows = _alone(runs, batches)
    order = [row.layer for row in rows]
    if together or max_kl < math.inf:
        sums = _sweep(runs, batches, [order[: i + 1] for i in range(1, budget)])
        together_ = [rows[0].divergence, *(found.mean for found in sums)]
        rows = [replace(row, cumulative=value) for row, value in zip(rows, together_)] + rows[budget:]
    within = [i for i, row in enumerate(rows[:budget]) if max_kl < math.inf and row.cumulative > max_kl]
    return rows, order[: within[0] if within else budget]


def _greedy(runs: _Runs, batches: _Batches, budget: int, max_kl: float) -> tuple[list[Replacement], list[int]]:
    """Try every remaining layer beside the chosen ones, keep the best, and repeat."""
    alone = _alone(runs, batches)
    rows: list[Replacement] = []
    best, least = alone[0].layer, alone[0].divergence
    while least <= max_kl:
        row = next(row for row in alone if row.layer == best)
        alone.remove(row)
        rows.append(replace(row, cumulative=least))
        if len(rows) == budget:
            break
        chosen = [row.layer for row in rows]
        sums = _sweep(runs, batches, [(*chosen, row.layer) for row in alone])
        least, best = min((found.mean, row.layer) for found, row in zip(sums, alone))
    return [*rows, *alone], [row.layer for row in rows]
