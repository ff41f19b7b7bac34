"""timm's classifier heads for maps and tokens, with one behaviour in all supported versions of timm."""

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d
from torch import nn

from terrazzo.errors import InputError

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "")
"""The poolings that timm has; "" keeps every position, "catavgmax" doubles the channels."""


class Head(ClassifierHead):
    """timm's pooling and classifier, with features of newer versions.

    Before timm 1.0.29 `reset` took no device; before 1.0.31 heads had no `num_features`.

    Attributes:
        poolings: Names of the poolings that the head has.
        in_features: Channels of the input.
        num_features: Channels after the pooling, the input of the classifier.
    """

    poolings = POOLINGS

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        input_fmt: str = "NCHW",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        input_fmt: "NCHW" or "NHWC".

        Raises:
            InputError: `pool_type` is not one of `poolings`.
        """
        super().__init__(in_features, 0, "", drop_rate, input_fmt=input_fmt)
        self._fit(num_classes, pool_type, device=device, dtype=dtype)

    def _fit(self, num_classes: int, pool_type: str, **factory) -> None:
        if pool_type not in self.poolings:
            raise InputError(f"global_pool must be one of {', '.join(map(repr, self.poolings))}, got {pool_type!r}")
        self.global_pool = self._pooling(pool_type)
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.fc = nn.Linear(self.num_features, num_classes, **factory) if num_classes > 0 else nn.Identity()

    def _pooling(self, pool_type: str) -> SelectAdaptivePool2d:
        return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type), input_fmt=self.input_fmt)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the classifier; 0 classes remove it. The pooling stays unless `pool_type` is given.

        Raises:
            InputError: `pool_type` is not one of `poolings`.
        """
        pool_type = self.global_pool.pool_type if pool_type is None else pool_type
        self._fit(num_classes, pool_type, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (B, classes), without pooling in the layout of `x`; with `pre_logits` the classifier's input."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.classify(x)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 4 and self.input_fmt == "NCHW":
            return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(x)


class ClassToken(SelectAdaptivePool2d):
    """A placeholder of the pooling "token": timm reads `pool_type` from it when it writes a configuration."""

    def __init__(self, input_fmt: str):
        super().__init__(pool_type="", input_fmt=input_fmt)
        self.pool_type = "token"


class TokenHead(Head):
    """timm's head on tokens (B, T, C): the pooling "token" takes the class token, all others pool the positions."""

    poolings = ("token", *POOLINGS)

    def __init__(self, in_features: int, num_classes: int, pool_type: str = "token", drop_rate: float = 0.0, **factory):
        super().__init__(in_features, num_classes, pool_type, drop_rate, input_fmt="NHWC", **factory)

    @property
    def token(self) -> bool:
        """Whether the head takes the class token alone."""
        return isinstance(self.global_pool, ClassToken)

    @property
    def of_positions(self) -> bool:
        """Whether the output depends on the number of positions that a token stands for."""
        return not self.token and not self.global_pool.is_identity()

    def _pooling(self, pool_type: str) -> SelectAdaptivePool2d:
        return ClassToken(self.input_fmt) if pool_type == "token" else super()._pooling(pool_type)

    @staticmethod
    def class_token(x: torch.Tensor) -> torch.Tensor:
        """The class token (B, C) of (B, T, C)."""
        return x[:, 0]

    @staticmethod
    def positions(x: torch.Tensor) -> torch.Tensor:
        """The tokens (B, T, C) without the class token."""
        return x[:, 1:]

    def separate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the image (B, classes), and a second classifier's of patches (B, T - 1, classes) or None."""
        return self(x), None

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.token:
            x = self.class_token(x)
        elif self.of_positions:
            x = self.positions(x).unsqueeze(2)
        return super().forward(x, pre_logits=pre_logits)
