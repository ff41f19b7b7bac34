"""timm's classifier, the same with every timm that terrazzo runs on."""

import torch
from timm.layers import ClassifierHead, create_classifier


class Head(ClassifierHead):
    """timm's pooling and classifier. Before timm 1.0.29 a reset took no device, before 1.0.31 none had `num_features`.

    Attributes:
        in_features: channels of what comes in.
        num_features: those behind the pooling, which the classifier takes.
    """

    def __init__(self, in_features: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0, **kwargs):
        """Args:
        kwargs: `input_fmt`, "NCHW" or "NHWC", `device` and `dtype`.
        """
        super().__init__(in_features, num_classes, pool_type, drop_rate, **kwargs)
        self.num_features = self._pooled()

    def _pooled(self) -> int:
        return self.in_features * self.global_pool.feat_mult()

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A new classifier of `in_features`, none for 0 classes; the pooling stays unless one is named."""
        pool_type = self.global_pool.pool_type if pool_type is None else pool_type
        self.global_pool, self.fc = create_classifier(
            self.in_features, num_classes, pool_type, input_fmt=self.input_fmt, device=device, dtype=dtype
        )
        self.num_features = self._pooled()
