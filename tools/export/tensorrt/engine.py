"""TensorRT engines, built from an ONNX file and run by TensorRT's Python API on this machine's GPU.

The network is strongly typed: each tensor has the type that the ONNX file gives it, so that a file of mixed precision
keeps its float32 layers (TensorRT 10.12 deprecated the flags that let TensorRT choose, and 11 does not have them). TF32
is off, because with it a float32 file would not agree with PyTorch.

The code is for TensorRT 10 and 11. Their bindings have every name used here; it has not run on a GPU yet.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import tensorrt as trt
import torch
from torch import Tensor, cuda

from terrazzo.errors import InputError
from terrazzo.tools.export.checked import Form, Task
from terrazzo.tools.export.tensorrt.plan import Shape, ranges
from terrazzo.tools.inspect.timing import Quantiles, interleaved, throughput_timer

DEVICE = "cuda"

OLDEST = 10
"""TensorRT's first version with strongly typed networks from its ONNX parser."""

_TYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT64: torch.int64,
    trt.DataType.INT32: torch.int32,
    trt.DataType.INT8: torch.int8,
    trt.DataType.UINT8: torch.uint8,
    trt.DataType.BOOL: torch.bool,
}


class EngineForm:
    """A serialised engine, NAME.engine, for this version of TensorRT and this kind of GPU.

    Args:
        onnx: writes the ONNX file that the engine is built from.

    Raises:
        InputError: TensorRT is too old.
    """

    suffixes = (".engine",)
    runtime = "TensorRT"

    def __init__(self, onnx: Form):
        if int(trt.__version__.split(".")[0]) < OLDEST:
            raise InputError(f"TensorRT {OLDEST} or later is needed, and this is {trt.__version__}: upgrade tensorrt")
        self.onnx = onnx
        self.engine: Engine | None = None
        self.example: tuple[Tensor, ...] = ()

    def write(self, task: Task, path: Path) -> str:
        graph = path.with_name("graph.onnx")
        self.onnx.write(task, graph)
        shapes = ranges(task.input_names, [value.shape for value in task.arguments], task.dynamic)
        path.write_bytes(build(graph, shapes))
        graph.unlink()
        smallest, _, largest = shapes[task.input_names[0]]
        extent = f", from {_by(smallest)} to {_by(largest)}" if task.dynamic else ""
        return f"engine of TensorRT {trt.__version__} for {cuda.get_device_name()}{extent}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        self.engine = Engine(path.read_bytes(), task.input_names, task.output_names)
        self.example = task.arguments
        return self.engine

    def divergence(self, task: Task, limit: float) -> str | None:
        return self.onnx.divergence(task, limit)

    def speed(self) -> str:
        """The time that the last loaded engine takes for the example, in words."""
        fast, median, slow = (f"{1e3 * seconds:.3f}" for seconds in self.engine.seconds(*self.example))
        shape = _by(self.example[0].shape)
        return f"a run of {shape} takes {median} ms on the GPU, the median ({fast} to {slow} from p20 to p80)"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


class _Log(trt.ILogger):
    """Keeps TensorRT's error messages and prints none of its messages."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity, msg: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(msg)

    def last(self) -> str:
        return self.errors[-1].strip().split("\n")[0] if self.errors else "TensorRT does not say why"


def build(path: Path, shapes: dict[str, tuple[Shape, Shape, Shape]]) -> bytes:
    """An engine of an ONNX file, serialised.

    Args:
        path: the ONNX file.
        shapes: for each input, the smallest, the optimal and the largest shape.

    Raises:
        InputError: TensorRT cannot read the file, or cannot build an engine of it here.
    """
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise InputError(_unparsed([parser.get_error(index) for index in range(parser.num_errors)]))
    profile = builder.create_optimization_profile()
    for name, (smallest, best, largest) in shapes.items():
        profile.set_shape(name, smallest, best, largest)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.clear_flag(trt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise InputError(f"TensorRT {trt.__version__} cannot build the engine: {log.last()}")
    return bytes(engine)


def _unparsed(errors: list) -> str:
    """One line for the errors of TensorRT's parser: every node once, the first with the reason."""
    nodes = list(dict.fromkeys(f"{error.node_operator()} ({error.node_name()})" for error in errors))
    if not nodes:
        return f"TensorRT {trt.__version__} cannot read the ONNX file, and does not say why"
    more = f"; nor {', '.join(nodes[1:])}" if nodes[1:] else ""
    return f"TensorRT {trt.__version__} does not take {nodes[0]}: {errors[0].desc()}{more}"


class _Output(trt.IOutputAllocator):
    """Memory for one output; its size may be known only when it is computed."""

    def __init__(self, dtype: torch.dtype):
        trt.IOutputAllocator.__init__(self)
        self.dtype = dtype
        self.memory: Tensor | None = None
        self.shape: Shape = ()

    def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
        if self.memory is None or self.memory.numel() < size:
            # PyTorch's blocks begin at multiples of 512 bytes, and TensorRT asks for 256; no address means no memory
            self.memory = torch.empty(max(size, 1), dtype=torch.uint8, device=DEVICE)
        return self.memory.data_ptr()

    def notify_shape(self, tensor_name: str, shape) -> None:
        self.shape = tuple(shape)

    def tensor(self) -> Tensor:
        """The output, copied to the CPU."""
        count = torch.Size(self.shape).numel() * self.dtype.itemsize
        if not count:  # nothing was found, so no memory was requested
            return torch.empty(self.shape, dtype=self.dtype)
        return self.memory[:count].cpu().view(self.dtype).reshape(self.shape)


class Engine:
    """A deserialised engine on this machine's GPU; called with tensors on the CPU, it gives tensors on the CPU.

    Args:
        serialised: an engine from `build`.
        inputs: their names, in the order of the arguments.
        outputs: their names, in the order of the results.

    Raises:
        InputError: TensorRT cannot load it here.
    """

    def __init__(self, serialised: bytes, inputs: Sequence[str], outputs: Sequence[str]):
        self._log = _Log()  # TensorRT does not keep it alive
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise InputError(f"TensorRT {trt.__version__} cannot load the engine: {self._log.last()}")
        self._context = self._engine.create_execution_context()
        self.stream = cuda.Stream()  # on the default stream TensorRT would synchronise too much
        self.inputs = tuple(inputs)
        self.outputs = {name: _Output(self._dtype(name)) for name in outputs}

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """The outputs, in order.

        Raises:
            InputError: the engine does not take these shapes, or could not run.
        """
        with cuda.stream(self.stream):
            images = self._set(arguments)
            self._enqueue()
            self.stream.synchronize()
            del images  # they had to live until here
            return [output.tensor() for output in self.outputs.values()]

    def seconds(self, *arguments: Tensor) -> Quantiles:
        """p20, p50 and p80 of a run, by CUDA events around many in a row; the inputs are on the GPU already."""
        with cuda.stream(self.stream):
            images = self._set(arguments)
            timer = throughput_timer(torch.device(DEVICE))
            for _ in range(3):
                self._enqueue()
            quantiles = interleaved({"engine": self._enqueue}, timer=timer)["engine"]
            self.stream.synchronize()
            del images
        return quantiles

    def _set(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Give TensorRT all addresses; return the inputs on the GPU, which must outlive the run."""
        images = []
        for name, value in zip(self.inputs, arguments, strict=True):
            images.append(value.to(DEVICE, self._dtype(name)).contiguous())
            if not self._context.set_input_shape(name, tuple(value.shape)):
                raise InputError(f"the engine does not take {name} of the shape {tuple(value.shape)}")
            self._context.set_tensor_address(name, images[-1].data_ptr())
        for name, output in self.outputs.items():
            self._context.set_output_allocator(name, output)
        return images

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.stream.cuda_stream):
            raise InputError(f"TensorRT could not run the engine: {self._log.last()}")

    def _dtype(self, name: str) -> torch.dtype:
        return _TYPES[self._engine.get_tensor_dtype(name)]
