"""Problems of neighborhood attention: their names, their inputs, and whether a form solves them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from terrazzo.kernels import neighborhood_attention
from terrazzo.tools import results
from terrazzo.tools.bench.neighborhood.peers import Window
from terrazzo.tools.inspect.timing import Function

NAME = "neighborhood_attention"
# Dense attention needs a table of tokens squared per head; past this it is left out, and the table says so.
DENSE_TOKENS = 64 * 64
# How far a peer's result may differ from the portable form's in float32, relative to its norm.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """One problem, on which all forms are timed in turns."""

    batch: int
    size: tuple[int, int]
    heads: int
    kernel: tuple[int, int] = (7, 7)
    dilation: tuple[int, int] = (1, 1)
    dim: int = 32
    bias: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return "x".join(map(str, (self.batch, *self.size, self.heads, self.dim)))

    @property
    def variant(self) -> str:
        kernel, dilation = ("x".join(map(str, dict.fromkeys(pair))) for pair in (self.kernel, self.dilation))
        return f"kernel {kernel} dilation {dilation}" + ("" if self.bias else ", no bias")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def window(self) -> Window:
        return Window(self.size, self.kernel, self.dilation)

    def __str__(self) -> str:
        return f"{self.shape}, {self.variant}, {self.dtype_name}"

    def holds(self, row: results.Row) -> bool:
        """Whether a row was measured on this case."""
        return (row.shape, row.variant, row.dtype) == (self.shape, self.variant, self.dtype_name)

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        """Query, key, value and bias, fresh random numbers. The bias is float32, as under autocast."""
        torch.manual_seed(0)
        shape = (self.batch, *self.size, self.heads, self.dim)
        inputs = [torch.randn(shape, device=device).to(self.dtype) for _ in range(3)]
        if self.bias:
            inputs.append(torch.randn(self.heads, *(2 * k - 1 for k in self.kernel), device=device))
        return [x.requires_grad_() for x in inputs]


def attend(case: Case, backend: str, query, key, value, rpb=None) -> torch.Tensor:
    """Our operator, with a backend."""
    return neighborhood_attention(query, key, value, case.kernel, case.dilation, rpb, backend=backend)


def gradients(form: Function, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of `form`'s output by each of the inputs."""
    return torch.autograd.grad(form(), inputs, grad)


def _one_head(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first head of maps, and of the bias behind them, in float32."""
    maps, tables = tensors[:3], tensors[3:]
    return [x.detach().float() for x in (*(x[..., :1, :] for x in maps), *(x[:1] for x in tables))]


def expected(case: Case, inputs: list[torch.Tensor], grad: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """The output, or the gradients, of the first head, by the portable form in float32."""
    inputs = [x.requires_grad_() for x in _one_head(inputs)]
    form = partial(attend, case, "portable", *inputs)
    with torch.set_grad_enabled(training):
        found = gradients(form, inputs, *_one_head([grad])) if training else [form()]
    return [x.detach() for x in found]


def fault(case: Case, wanted: list[torch.Tensor], found: torch.Tensor | tuple[torch.Tensor, ...]) -> str | None:
    """What is wrong with a form's output or gradients: a peer must compute the same."""
    found = _one_head(found if isinstance(found, tuple) else (found,))
    for name, a, b in zip(("query", "key", "value", "bias") if len(found) > 1 else ("output",), found, wanted):
        error = ((a - b).norm() / b.norm()).item()
        if not error <= _TOLERANCE[case.dtype]:
            what = name if name == "output" else f"gradient of the {name}"
            return f"its {what} is wrong: relative error {error:.1e}"
    return None
