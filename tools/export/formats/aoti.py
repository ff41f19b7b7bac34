"""Models that AOTInductor compiles to machine code of this processor."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from terrazzo.errors import InputError
from terrazzo.tools.export.checked import Task, not_exportable
from terrazzo.tools.export.formats.pt2 import traced
from terrazzo.tools.runtimes.package import open_package


class CompiledForm:
    """A package of AOTInductor, for `aoti_load_package` or C++: NAME.pt2, a shared library with the weights inside.

    It needs PyTorch, but neither terrazzo nor a compiler, and a processor that has the instructions of the processor it
    was compiled on.

    Raises:
        InputError: there is no C++ compiler.
    """

    suffixes = (".pt2",)
    runtime = "the compiled program"

    def __init__(self):
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise InputError(
                "AOTInductor needs a C++ compiler and finds none: install g++, set the variable CXX, or export "
                "with --format pt2, which needs no compiler"
            ) from error

    def write(self, task: Task, path: Path) -> str:
        program = traced(task, "aoti")
        facts = {"outputs": ", ".join(task.output_names), **task.metadata}
        if "hw" not in task.dynamic:
            facts["size"] = "x".join(map(str, task.arguments[0].shape[-2:]))
        settings = {"aot_inductor.metadata": facts}
        if any(free_unbacked_symbols(node.meta.get("val")) for node in program.graph.nodes):
            # PyTorch 2.15 mixes up the memory order of consecutive convolutions if their batch is the number of boxes
            # found.
            settings["layout_optimization"] = False
        try:
            with torch.no_grad():
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
        except RuntimeError as error:
            raise not_exportable(task.module, "aoti", error) from error
        return f"AOTInductor of PyTorch {torch.__version__.split('+')[0]}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        return open_package(path)[0]

    def divergence(self, task: Task, limit: float) -> str | None:
        return None
