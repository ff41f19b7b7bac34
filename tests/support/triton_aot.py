"""Triton kernels compiled ahead of time for GPUs that are not here, and the resources that each needs."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch

# Shared memory of one program, in bytes, and of its registers what the target's own assembler says.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_kernel(function, values, dtype, target, warps, stages, floats=(), ones=(), others=()):
    """Compile one kernel as a model's tensors launch it: pointers and strides are multiples of 16.

    Args:
        function: the `triton.jit` function.
        values: its constants by name; others may be among them.
        dtype: of what its pointers point to.
        target: "sm_90", "gfx942" and the like.
        floats: pointers to float32 whatever `dtype` is, and numbers of float32; `scale` always is one, any other
            argument an int32.
        ones: arguments that are 1, which Triton takes as constants.
        others: types of pointers to anything else by name, such as "i64".
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
        if name.startswith(("p_", "stride")) and name not in ones:  # what Triton sees of a packed tensor of a model
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, {k: v for k, v in values.items() if k in constant}, attributes)
    return triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=stages))


def resources(compiled, target):
    """Registers per thread and bytes of spilled registers."""
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
