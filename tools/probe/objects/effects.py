"""How far a plain ViT's result moves if the binding part of one block's tokens is disturbed."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.tools.probe.objects.ablation import Change, Subspace, changed_block, inject, random_like, shuffle, zero
from terrazzo.tools.probe.objects.collect import Cells, levels_of
from terrazzo.tools.probe.objects.readouts import LowRank, Training, fit

_READOUT = "quad-16"
_TOKENS = 4096


class Effects:
    """Ablations of one block.

    Args:
        model: a plain ViT of timm.
        level: the block.
        device: where the model is.

    Raises:
        InputError: the model is no plain ViT, or lacks the block.
    """

    def __init__(self, model: nn.Module, level: int, device: torch.device):
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not hasattr(model, "num_prefix_tokens"):
            raise InputError(f"--ablate disturbs the tokens of a plain ViT, and {type(model).__name__} is none")
        if not 0 <= level < len(blocks):
            raise InputError(f"--ablate {level}: the blocks are 0 to {len(blocks) - 1}")
        self.model, self.level, self.device = model, level, device
        self.block, self.front = blocks[level], model.num_prefix_tokens
        self.grid = (0, 0)  # known after the first image

    def table(self, train: Cells, val: Cells, training: Training) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Train the low-rank readout on the block, and disturb its subspace and a random one in the pictures of val.

        Returns:
            Head and lines: the change, and for both subspaces the relative change and the cosine of the final tokens
            behind those in front and, if the model classifies, the share of pictures whose class stays.
        """
        binding, random = self._subspaces(train, training)
        names = ("shuffle 50 %", "shuffle all", "inject, alpha 0.5", "inject, alpha 0", "zero")
        sums = {(name, kind): torch.zeros(3, dtype=torch.double) for name in names for kind in ("binding", "random")}
        for index in range(len(val)):
            image = val.image(index).to(self.device)
            before = self._run(image)
            for name, change in zip(names, self._changes(val, index)):
                for kind, subspace in (("binding", binding), ("random", random)):
                    with changed_block(self.block, self.front, subspace, change):
                        sums[name, kind] += self._apart(before, self._run(image))
        classes = self.model.num_classes > 0
        lines = []
        for name in names:
            means = [sums[name, kind] / len(val) for kind in ("binding", "random")]
            cells = [f"{mean[0]:.3f}" for mean in means] + [f"{mean[1]:.4f}" for mean in means]
            lines.append((name, *cells, *(f"{100 * mean[2]:.0f}" for mean in means if classes)))
        head = [f"block {self.level}"]
        for what in ("relative change", "cosine", *(("same class, %",) if classes else ())):
            head += [f"{what}, binding", f"{what}, random"]
        return tuple(head), lines

    @torch.inference_mode()
    def _run(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The final tokens behind those in front (N, C), and the class."""
        tokens = self.model.forward_features(image)
        logits = self.model.forward_head(tokens) if self.model.num_classes > 0 else None
        return tokens[0, self.front :], None if logits is None else logits.argmax(-1)

    @staticmethod
    def _apart(before: tuple, after: tuple) -> Tensor:
        (old, old_class), (new, new_class) = before, after
        same = float("nan") if old_class is None else float(old_class == new_class)
        far = ((new - old).norm(dim=-1) / old.norm(dim=-1)).mean().item()
        return torch.tensor((far, F.cosine_similarity(new, old, dim=-1).mean().item(), same), dtype=torch.double)

    def _subspaces(self, train: Cells, training: Training) -> tuple[Subspace, Subspace]:
        """The readout's, and a random one that holds as much of the variance."""
        found = []
        for index in range(len(train)):
            level = levels_of(self.model, train.image(index).to(self.device))[self.level]
            self.grid = (level.shape[2], level.shape[3])
            found.append(level[0].flatten(1).T[torch.from_numpy(train.cells(index, self.grid)[0])].cpu())
        data = train.sampled(self.grid, found)
        readout = fit(_READOUT, data.standardised(data), training)
        assert isinstance(readout, LowRank)
        tokens = torch.cat(found)[:_TOKENS]
        mean, deviation = data.moments()
        subspace = Subspace((readout.project.weight / deviation).detach(), mean)
        other = random_like(subspace, tokens, training.seed)
        return tuple(Subspace(x.basis.to(self.device), x.mean.to(self.device)) for x in (subspace, other))

    def _changes(self, val: Cells, index: int) -> Iterator[Change]:
        """In the order of the table's lines."""
        labels = torch.from_numpy(val.labels(index, self.grid).ravel().copy()).to(self.device)
        objects = torch.where(labels > 0, labels, -1)
        yield shuffle(0.5, val.sampling.seed)
        yield shuffle(1.0, val.sampling.seed)
        yield inject(objects, 0.5)
        yield inject(objects, 0.0)
        yield zero
