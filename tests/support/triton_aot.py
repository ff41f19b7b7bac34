"""Triton kernels compiled ahead of time for GPUs that this machine lacks, and the resources that each kernel needs."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch

# Shared memory available to one program, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_kernel(function, values, dtype, target, warps, stages, floats=(), ones=(), others=()):
    """Compile one kernel as a model's tensors launch it: pointers and strides are multiples of 16.

    Args:
        function: the `triton.jit` function.
        values: its constants by name; others may be among them.
        dtype: the dtype of tensors that its pointers point to.
        target: a GPU architecture, for example "sm_90" or "gfx942".
        floats: arguments that are pointers to float32 for every `dtype`, or float32 numbers. `scale` is always float32;
            any other argument is an int32.
        ones: arguments that are 1, which Triton takes as constants.
        others: types of other pointers by name, for example "i64".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    constant = {parameter.name for parameter in function.params if parameter.is_constexpr}
    values = {**values, **{name: 1 for name in function.arg_names if name in ones}}
    constant.update(ones)
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constant:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*" + ("fp32" if name in floats else dict(others).get(name, TYPES[dtype]))
        else:
            signature[name] = "fp32" if name == "scale" or name in floats else "i32"
        if name.startswith(("p_", "stride")) and name not in ones:  # so Triton sees a model's packed tensor
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, {k: v for k, v in values.items() if k in constant}, attributes)
    return triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=stages))


def resources(compiled, target):
    """The registers per thread and the bytes of spilled registers, as the target's assembler reports them."""
    import triton

    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        return tuple(int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1]) for what in ("count", "spill_count"))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    return int(found[1]), int(found[2]) + int(found[3])
