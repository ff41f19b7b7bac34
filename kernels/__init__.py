"""Operators: what each means (reference), a portable form that runs everywhere, and where there is one a fused form."""

from terrazzo.kernels.attentive_conv import attentive_conv as attentive_conv
from terrazzo.kernels.backend import use_backend as use_backend
from terrazzo.kernels.neighborhood_attention import neighborhood_attention as neighborhood_attention

__all__ = ["attentive_conv", "neighborhood_attention", "use_backend"]
