"""A fake of the part of TensorRT's Python API that `terrazzo.tools.export.tensorrt.engine` calls, on the CPU.

Every name and the arguments of every method follow the bindings of TensorRT 10.15 and 11.4 (looked up in the modules
themselves); there are no other names. An engine is the ONNX file and the profile. It runs in ONNX Runtime, on memory
that is given by address, and writes its outputs to the addresses from the allocators. So the tests check the calls of
the API, not TensorRT.
"""

import ctypes
import enum
import pickle

import numpy as np
import onnx
import onnxruntime

__version__ = "10.15.1.29"

STREAM = 7
REFUSED = "Erf"
"""This parser refuses files with this operator."""


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 6


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    BF16 = 7
    INT64 = 8


_NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT64: np.int64,
    DataType.INT32: np.int32,
    DataType.UINT8: np.uint8,
    DataType.BOOL: np.bool_,
}
_ONNX = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value)): key for key, value in _NUMPY.items()}


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def __init__(self):
        self.ready = True


class IOutputAllocator:
    def __init__(self):
        self.ready = True


def _check(base):
    assert base.ready, "the base class was not initialised"
    return base


class _Network:
    def __init__(self, flags):
        self.flags, self.model = flags, b""


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        assert len(min) == len(opt) == len(max)
        assert all(a <= b <= c for a, b, c in zip(min, opt, max))
        self.shapes[input] = (min, opt, max)


class _Config:
    def __init__(self):
        self.flags, self.profiles = {BuilderFlag.TF32}, []

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return 0


class Builder:
    def __init__(self, logger):
        self.logger = _check(logger)

    def create_network(self, flags=0):
        return _Network(flags)

    def create_optimization_profile(self):
        return _Profile()

    def create_builder_config(self):
        return _Config()

    def build_serialized_network(self, network, config):
        assert network.flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert BuilderFlag.TF32 not in config.flags
        (profile,) = config.profiles
        for value in onnx.load_from_string(network.model).graph.input:
            for fixed, sizes in zip(value.type.tensor_type.shape.dim, zip(*profile.shapes[value.name])):
                if fixed.HasField("dim_value") and set(sizes) != {fixed.dim_value}:
                    self.logger.log(ILogger.Severity.ERROR, "IBuilder::buildSerializedNetwork: Error Code 4\nmore")
                    return None
        return pickle.dumps((network.model, profile.shapes))


class _ParserError:
    def __init__(self, node):
        self.of = node

    def node_name(self):
        return self.of.name

    def node_operator(self):
        return self.of.op_type

    def desc(self):
        return "no importer registered"


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.logger, self.errors = network, _check(logger), []

    def parse_from_file(self, model):
        assert type(model) is str
        found = onnx.load(model)
        self.errors = [_ParserError(node) for node in found.graph.node if node.op_type == REFUSED]
        self.network.model = found.SerializeToString()
        return not self.errors

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, index):
        return self.errors[index]


class Runtime:
    def __init__(self, logger):
        self.logger = _check(logger)

    def deserialize_cuda_engine(self, serialized_engine):
        return _Engine(self.logger, *pickle.loads(serialized_engine))


class _Engine:
    def __init__(self, logger, model, shapes):
        self.logger, self.shapes, self.session = logger, shapes, onnxruntime.InferenceSession(model)
        graph = onnx.load_from_string(model).graph
        self.types = {value.name: _ONNX[value.type.tensor_type.elem_type] for value in (*graph.input, *graph.output)}

    def get_tensor_dtype(self, name):
        return self.types[name]

    def create_execution_context(self):
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self.engine, self.inputs, self.addresses, self.allocators = engine, {}, {}, {}

    def set_input_shape(self, name, shape):
        assert type(shape) is tuple
        smallest, _, largest = self.engine.shapes[name]
        self.inputs[name] = shape
        return all(low <= size <= high for low, size, high in zip(smallest, shape, largest))

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def set_output_allocator(self, name, output_allocator):
        self.allocators[name] = _check(output_allocator)
        return True

    def execute_async_v3(self, stream_handle):
        assert stream_handle == STREAM
        feeds = {}
        for name, shape in self.inputs.items():
            feeds[name] = np.empty(shape, _NUMPY[self.engine.types[name]])
            ctypes.memmove(feeds[name].ctypes.data, self.addresses[name], feeds[name].nbytes)
        names = [value.name for value in self.engine.session.get_outputs()]
        for name, value in zip(names, self.engine.session.run(names, feeds)):
            memory = self.allocators[name].reallocate_output_async(name, 0, value.nbytes, 256, stream_handle)
            assert memory
            ctypes.memmove(memory, np.ascontiguousarray(value).ctypes.data, value.nbytes)
            self.allocators[name].notify_shape(name, value.shape)
        return True
