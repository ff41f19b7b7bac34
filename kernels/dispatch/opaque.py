"""What all opaque ops share: which derivatives they have, and what they return for an empty batch.

PyTorch does not see into an opaque op. The op has one gradient, in reverse mode. In forward mode it would treat every
tangent as 0, `torch.func` cannot transform it, and its gradient has no gradient. So an operator asks `needs_more`; if
the answer is yes, it runs a form of standard operations, which have all derivatives. An op that is still called in
forward mode, or asked for a second gradient, raises an error.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, profiler

from terrazzo.errors import BackendError

MORE = (
    "it has one gradient, in reverse mode, and this call is in forward mode or within a transform of torch.func: "
    'use_backend("reference") has all derivatives'
)


def needs_more() -> bool:
    """Whether a call may need derivatives other than one gradient in reverse mode.

    It may in forward mode, and inside `torch.func.grad`, `jvp` or a transform that is built from them. `vmap` alone
    calls an op once for each slice.
    """
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and any(level.key().name in ("Grad", "Jvp") for level in stack)


# Dynamo takes the value while tracing, and guards the stack of transforms. A graph that was traced outside forward mode
# and runs inside it contains the ops, which then raise an error.
needs_more._dynamo_marked_constant = True


def _refuse(name: str) -> None:
    operator = name.removeprefix("terrazzo::").removesuffix("_backward")
    raise BackendError(
        f"{operator}: this backend has one gradient, in reverse mode, and no other derivative; "
        'run the forward pass within use_backend("reference"), which has all derivatives'
    )


def op(name: str, fake: Callable) -> Callable:
    """Like `torch.library.custom_op`, with a fake form. `register_gradient` adds the gradient.

    Where nobody else would see the op, its function runs without it (`_is_direct`).

    If the first tensor has no rows (an empty batch), the op returns zeros in the shapes of `fake`: outputs are empty,
    and gradients of weights are 0.

    Args:
        name: "terrazzo::..."; the name of its gradient's op ends in "_backward".
        fake: the fake form: it returns tensors like the op's, with any content.
    """

    def define(function: Callable) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def checked(*args):
            if forward_ad._current_level >= 0:
                _refuse(name)
            if args[0].shape[0] == 0:
                found = fake(*args)
                return tuple(map(torch.zeros_like, found)) if isinstance(found, tuple) else torch.zeros_like(found)
            return function(*args)

        defined = torch.library.custom_op(name, mutates_args=())(checked)
        defined.register_fake(fake)
        defined.register_autograd(lambda ctx, *grads: _refuse(name))

        @functools.wraps(function)
        def call(*args):
            if torch.compiler.is_compiling() or not _is_direct(args):
                return defined(*args)
            return checked(*args)

        call.defined = defined
        return call

    return define


def _is_direct(args: tuple) -> bool:
    """Whether nobody but the caller would see the op, so that its function can be called instead.

    PyTorch takes longer for the call of an op than some of the kernels on a CPU take for small tensors.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    if profiler._is_profiler_enabled or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if any(type(x) not in _PLAIN or x.device.type != "cpu" or _is_batched(x) for x in tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of `torch.autograd.grad(is_grads_batched=True)`


def register_gradient(call: Callable, gradient: Callable, setup_context: Callable) -> None:
    """Like `register_autograd` of a custom op, for an op of `op` and a gradient that is itself an opaque op."""
    defined = call.defined

    @functools.wraps(gradient)
    def checked(ctx, *grads):
        if needs_more():
            _refuse(defined._qualname)
        return gradient(ctx, *grads)

    defined.register_autograd(checked, setup_context=setup_context)


class _Once(torch.autograd.Function):
    """The identity on a gradient, with a backward pass that raises an error."""

    @staticmethod
    def forward(ctx, grad: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        _refuse(ctx.name)


def _refusing(name: str, grad: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient hook: makes a second differentiation an error. None leaves the gradient as it is."""
    return None if grad is None or not grad.requires_grad else _Once.apply(grad, name)


def attention(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """PyTorch's attention on (B, H, N, D). Its kernels are opaque, too; calls that `needs_more` use plain products.

    Args:
        name: the operator that the error names.
    """
    if needs_more():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for x in (query, key, value):
            if x.grad_fn is not None:
                x.register_hook(functools.partial(_refusing, name))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
