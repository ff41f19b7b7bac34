"""timm's classifiers of maps and of tokens, the same with every timm that terrazzo runs on."""

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d
from torch import nn

from terrazzo.errors import InputError

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "")
"""What timm knows by name; "" leaves every position, "catavgmax" doubles the channels."""


class Head(ClassifierHead):
    """timm's pooling and classifier. Before timm 1.0.29 a reset took no device, before 1.0.31 none had `num_features`.

    Attributes:
        poolings: Names of those that the head knows.
        in_features: Channels of what comes in.
        num_features: Channels behind the pooling, which the classifier takes.
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
            InputError: `pool_type` is none of `poolings`.
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
        """A new classifier of `in_features`, none for 0 classes; the pooling stays unless one is named.

        Raises:
            InputError: `pool_type` is none of `poolings`.
        """
        pool_type = self.global_pool.pool_type if pool_type is None else pool_type
        self._fit(num_classes, pool_type, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (B, classes), without pooling in the layout of `x`; before the classifier with `pre_logits`."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.classify(x)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 4 and self.input_fmt == "NCHW":
            return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(x)


class ClassToken(SelectAdaptivePool2d):
    """In the place of timm's pooling where one token is taken: timm reads there what it writes into a configuration."""

    def __init__(self, input_fmt: str):
        super().__init__(pool_type="", input_fmt=input_fmt)
        self.pool_type = "token"


class TokenHead(Head):
    """timm's head on tokens (B, T, C): the pooling "token" takes the class token, all others those of positions."""

    poolings = ("token", *POOLINGS)

    def __init__(self, in_features: int, num_classes: int, pool_type: str = "token", drop_rate: float = 0.0, **factory):
        super().__init__(in_features, num_classes, pool_type, drop_rate, input_fmt="NHWC", **factory)

    @property
    def token(self) -> bool:
        """Whether the class token alone is taken."""
        return isinstance(self.global_pool, ClassToken)

    @property
    def of_positions(self) -> bool:
        """Whether what comes out depends on how many positions a token stands for."""
        return not self.token and not self.global_pool.is_identity()

    def _pooling(self, pool_type: str) -> SelectAdaptivePool2d:
        return ClassToken(self.input_fmt) if pool_type == "token" else super()._pooling(pool_type)

    @staticmethod
    def class_token(x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, C)."""
        return x[:, 0]

    @staticmethod
    def positions(x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) without the class token."""
        return x[:, 1:]

    def separate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the image (B, classes) and, where there is a second classifier, of patches (B, T - 1, classes)."""
        return self(x), None

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.token:
            x = self.class_token(x)
        elif self.of_positions:
            x = self.positions(x).unsqueeze(2)
        return super().forward(x, pre_logits=pre_logits)
