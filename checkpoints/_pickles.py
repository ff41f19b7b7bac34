"""Pickles read as data: an interpreter of pickle's opcodes that calls nothing but the stand-ins of this file.

PyTorch's own `weights_only` reader calls constructors of PyTorch and NumPy with arguments from the file, and some of
these trust the arguments with memory; its list of allowed names is global to the process, and any code may add to it.
Here, each name that a checkpoint may use is bound to a short function that checks its arguments before it makes an
array or a tensor. Nothing outside this list is looked up, imported or called.
"""

import collections
import math
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

DEPTH = 100
"""How deep a checkpoint's dicts, lists and tuples may be nested."""

OPERATIONS = 10_000_000
"""How many operations a pickle may have, and how many items its result."""


class Refused(Exception):
    """Raised for a file that is not read. The message says why, as the end of a sentence that begins with the file."""


class History(NamedTuple):
    """A log of mmengine's, where nobody asks for mmengine's own class: a value and a count for each step."""

    log: Any
    count: Any
    max_length: int


class Stored(NamedTuple):
    """The bytes of tensors, and their dtype; None if each tensor has its own."""

    storage: torch.UntypedStorage
    dtype: torch.dtype | None


class Kind(NamedTuple):
    """Stands for a class that a pickle only names: a class of arrays, tensors, or storages with their dtype."""

    name: str
    dtype: torch.dtype | None = None


class Call(NamedTuple):
    """Stands for a function or a class that a pickle calls; `function` takes the `Reader` and the arguments."""

    function: Callable[..., Any]


class _Dtype:
    """A dtype of NumPy; the byte order may still follow."""

    def __init__(self, value: np.dtype):
        self.value = value


class _Array:
    """An array of NumPy; the numbers are still to follow."""

    value: np.ndarray | None = None


class _History:
    """A HistoryBuffer of mmengine; the numbers are still to follow."""

    state: dict | None = None


class Reader:
    """Reads one pickle.

    Args:
        file: the file to read, up to the end of the pickle.
        storage: gives the bytes of tensors, from the pickle's reference: "storage", class, name, place, count.
        budget: how many bytes all arrays and tensors together may have, because a few bytes can claim terabytes.
        history: makes a log of values from its values, counts and largest length, which are checked.
    """

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[tuple], Stored],
        budget: int,
        history: Callable[[Any, Any, int], Any] = History,
    ):
        self.file = file
        self.storage = storage
        self.budget = budget
        self.history = history
        self.stack: list = []
        self.outer: list[list] = []
        self.memo: dict[int, Any] = {}
        self.unknown: set[str] = set()

    def load(self) -> Any:
        """The object: dicts, lists, tuples, sets, text, numbers, arrays, tensors and mmengine's histories.

        Raises:
            Refused: the pickle names something else, or is malformed or too large.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            if count > OPERATIONS:
                raise Refused(f"its pickle has more than {OPERATIONS:,} operations")
            if self.unknown:  # the file is refused already; the message names everything else that it holds
                if opcode.name == "GLOBAL":
                    self.find(*argument.split(" ", 1))
                continue
            if opcode.name not in _ACTIONS:
                raise Refused(f"its pickle uses {opcode.name}, and checkpoints do not")
            _ACTIONS[opcode.name](self, argument)
        if self.unknown:
            names = [name.encode("unicode_escape").decode()[:100] for name in sorted(self.unknown)[:10]]
            raise Refused(
                f"it holds objects other than plain data, tensors and log histories ({', '.join(names)}), and "
                "loading them could run code; save its state_dict alone where it was made"
            )
        return _Result(self.history).of(self.stack.pop(), 0)[0]

    def find(self, module: str, name: str) -> Any:
        """The replacement for a name. After an unknown name, names are only collected for the message."""
        module = "builtins" if module == "__builtin__" else re.sub(r"^numpy\.core\.", "numpy._core.", module)
        full = f"{module}.{name}"
        if full not in ALLOWED:
            self.unknown.add(full)
        return ALLOWED.get(full)

    def spend(self, size: int) -> None:
        """Subtracts bytes from the budget of arrays and tensors."""
        self.budget -= size
        if self.budget < 0:
            raise Refused("its arrays and tensors claim to be far larger than the file")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        """Takes the items since the last mark off the stack."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def join(self, count: int) -> None:
        """Makes a tuple of the last items."""
        if len(self.stack) < count:
            raise Refused("its pickle is malformed")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def call(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        if type(target) is not Call or type(arguments) is not tuple:
            raise Refused(f"its pickle calls a {type(target).__name__}")
        self.push(target.function(self, *arguments))

    def build(self) -> None:
        """Gives an object its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in _BUILDERS:
            raise Refused(f"its pickle sets the state of a {type(target).__name__}")
        _BUILDERS[type(target)](self, target, state)

    def extend(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused(f"its pickle appends to a {type(target).__name__}")
        target.extend(items)

    def add(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not set:
            raise Refused(f"its pickle adds to a {type(target).__name__}")
        target.update(map(check_key, items))

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, collections.OrderedDict, collections.Counter) or len(items) % 2:
            raise Refused(f"its pickle sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2]):
            target[check_key(key)] = value

    def push_found(self, name: Any, module: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("its pickle names an object by something other than text")
        self.push(self.find(module, name))

    def push_storage(self, said: Any) -> None:
        if type(said) is not tuple or len(said) < 5 or said[0] != "storage" or type(said[1]) is not Kind:
            raise Refused("its pickle refers to something other than a tensor's data")
        if [type(item) for item in said[2:5]] != [str, str, int] or said[4] < 0:
            raise Refused("its pickle refers to a tensor's data in a malformed way")
        self.push(self.storage(said))


def _text(text: str) -> str | bytes:
    """A string of Python 2, which pickletools gives in latin-1: text if it is valid text, else bytes."""
    data = text.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


_VALUES = (
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
)

_ACTIONS: dict[str, Callable[[Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda reader, _: None),
    **dict.fromkeys(_VALUES.split(), Reader.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda reader, text: reader.push(_text(text))),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda reader, place: reader.memo.update({place: reader.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda reader, place: reader.push(reader.memo[place])),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda reader, _: reader.call()),
    "MEMOIZE": lambda reader, _: reader.memo.update({len(reader.memo): reader.stack[-1]}),
    "BYTEARRAY8": lambda reader, data: reader.push(bytearray(data)),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_SET": lambda reader, _: reader.push(set()),
    "MARK": lambda reader, _: reader.mark(),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "TUPLE1": lambda reader, _: reader.join(1),
    "TUPLE2": lambda reader, _: reader.join(2),
    "TUPLE3": lambda reader, _: reader.join(3),
    "FROZENSET": lambda reader, _: reader.push(frozenset(map(check_key, reader.since_mark()))),
    "APPEND": lambda reader, _: reader.extend([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.extend(reader.since_mark()),
    "ADDITEMS": lambda reader, _: reader.add(reader.since_mark()),
    "SETITEM": lambda reader, _: reader.set_items([reader.stack.pop(), reader.stack.pop()][::-1]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.since_mark()),
    "GLOBAL": lambda reader, names: reader.push(reader.find(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda reader, _: reader.push_found(reader.stack.pop(), reader.stack.pop()),
    "BUILD": lambda reader, _: reader.build(),
    "BINPERSID": lambda reader, _: reader.push_storage(reader.stack.pop()),
}


_KEYS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def check_key(value: Any, depth: int = 0) -> Any:
    """Gives back a key of a dict or an item of a set.

    Raises:
        Refused: it is an object, or a deep or long tuple: hashing a deep tuple overflows the stack.
    """
    if type(value) in (tuple, torch.Size) and depth < 3 and len(value) <= 100:
        for item in value:
            check_key(item, depth + 1)
    elif type(value) not in _KEYS and not isinstance(value, np.generic):
        raise Refused(f"it has a key or an item of a set that is a {type(value).__name__}")
    return value


# Replacements for Python's own functions.


def _encode(reader: Reader, text: str, encoding: str = "utf-8") -> bytes:
    """`codecs.encode`, which pickles use to write bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("its pickle encodes text in another way than latin1, which is how bytes are written")
    reader.spend(len(text))
    return text.encode("latin-1")


def _bytes(reader: Reader) -> bytes:
    """`bytes`, which pickles call only for empty bytes."""
    return b""


def _bytearray(reader: Reader, data: Any = b"", encoding: str = "latin-1") -> bytearray:
    reader.spend(len(data))
    return bytearray(data if type(data) is bytes else _encode(reader, data, encoding))


def _complex(reader: Reader, real: float, imaginary: float) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise Refused("it has a malformed complex number")
    return complex(real, imaginary)


def _set(reader: Reader, items: list = []) -> set:  # noqa: B006  read only
    if type(items) not in (list, tuple):
        raise Refused("it has a malformed set")
    reader.spend(8 * len(items))
    return set(map(check_key, items))


def _counter(reader: Reader, counts: dict = {}) -> collections.Counter:  # noqa: B006  read only
    if type(counts) is not dict:
        raise Refused("it has a malformed Counter")
    reader.spend(8 * len(counts))
    counter = collections.Counter()
    dict.update(counter, counts)
    return counter


def _ordered(reader: Reader, pairs: list = []) -> collections.OrderedDict:  # noqa: B006  read only
    """An OrderedDict: its items follow, or from Python 2 they are pairs in a list."""
    if type(pairs) is not list or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
        raise Refused("it has a malformed OrderedDict")
    reader.spend(8 * len(pairs))
    return collections.OrderedDict((check_key(key), value) for key, value in pairs)


def _set_ordered(reader: Reader, target: collections.OrderedDict, state: Any) -> None:
    """The attributes of an OrderedDict: only what PyTorch stores beside a state dict."""
    if type(state) is dict and type(state.get("_metadata")) in (dict, collections.OrderedDict):
        target._metadata = state["_metadata"]


# Replacements for NumPy's functions.

_NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")


def _numpy_dtype(reader: Reader, code: str, align: Any = False, copy: Any = True) -> _Dtype:
    if type(code) is not str or not _NUMBERS.fullmatch(code):
        shown = ascii(code[:20]) if type(code) is str else f"a {type(code).__name__}"
        raise Refused(f"it holds a NumPy array of type {shown}, and only arrays of plain numbers are read")
    return _Dtype(np.dtype(code))


def _set_dtype(reader: Reader, target: _Dtype, state: Any) -> None:
    """The state of a dtype; only the byte order is taken."""
    if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "=", "|"):
        raise Refused("it holds a NumPy type that is malformed")
    if any(item is not None for item in state[2:5]):  # subtype, names and fields
        raise Refused("it holds a NumPy array of records, and only arrays of plain numbers are read")
    target.value = target.value.newbyteorder(state[1])


def _numbers(reader: Reader, dtype: Any, shape: Any, data: Any, order: str = "C") -> np.ndarray:
    """An array with a copy of the numbers, in the machine's byte order."""
    data = data.encode("latin-1") if type(data) is str else data  # from Python 2
    if type(dtype) is not _Dtype or type(data) not in (bytes, bytearray):
        raise Refused("it holds a NumPy array with numbers that are not bytes")
    shape = _sizes(shape)
    kind = dtype.value
    if len(shape) > 32 or math.prod(shape) * kind.itemsize != len(data):
        raise Refused(f"it holds a NumPy array of shape {shape[:8]} and {len(data)} bytes of {kind}, which do not fit")
    reader.spend(len(data))
    if kind.kind == "b":  # a byte other than 0 and 1 is not a boolean
        flat = np.frombuffer(data, np.uint8) != 0
    else:
        flat = np.frombuffer(data, kind).astype(kind.newbyteorder("="))
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _numpy_scalar(reader: Reader, dtype: Any, data: Any) -> np.generic:
    return _numbers(reader, dtype, (), data)[()]


def _numpy_begun(reader: Reader, kind: Any, shape: Any, code: Any) -> _Array:
    """`_reconstruct`, which makes an empty array; the rest follows as its state."""
    if kind != _NDARRAY:
        raise Refused("it holds a NumPy array of another class")
    return _Array()


def _set_array(reader: Reader, target: _Array, state: Any) -> None:
    if type(state) is not tuple or len(state) not in (4, 5):
        raise Refused("it holds a NumPy array that is malformed")
    shape, dtype, fortran, data = state[-4:]
    target.value = _numbers(reader, dtype, shape, data, "F" if fortran else "C")


def _numpy_buffer(reader: Reader, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """`_frombuffer`, which makes an array in pickles of protocol 5."""
    return _numbers(reader, dtype, shape, data, order)


# Replacements for PyTorch's functions.


def _sizes(values: Any) -> tuple[int, ...]:
    """A shape, or strides."""
    if not isinstance(values, (tuple, list)) or len(values) > 64:
        raise Refused("it has an array or a tensor with a malformed shape")
    if any(type(value) is not int or not 0 <= value < 2**62 for value in values):
        raise Refused("it has an array or a tensor with a size that is negative, too large or not a whole number")
    return tuple(values)


def _tensor(
    reader: Reader,
    stored: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`_rebuild_tensor_v2`: a tensor within its bytes, never past them."""
    if type(stored) is not Stored or (dtype := dtype or stored.dtype) is None:
        raise Refused("it has a tensor without data")
    if metadata:
        raise Refused("it has a tensor with its conjugate or negation still to be taken; save tensor.clone()")
    size, stride = _sizes(size), _sizes(stride)
    (offset,) = _sizes((offset,))
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if count else offset - 1
    room = stored.storage.nbytes() // dtype.itemsize
    if len(size) != len(stride) or last >= room or math.prod(max(length, 1) for length in size) >= 2**62:
        raise Refused(f"it has a tensor of shape {size[:8]} that does not fit into its {stored.storage.nbytes()} bytes")
    reader.spend(count * dtype.itemsize)
    tensor = torch.empty(0, dtype=dtype, device=stored.storage.device)
    tensor.set_(stored.storage, offset, size, stride)
    return tensor.requires_grad_(requires_grad is True)


def _tensor_of_dtype(
    reader: Reader,
    stored: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> torch.Tensor:
    """`_rebuild_tensor_v3`: as v2, for a dtype without its own storage class."""
    if type(dtype) is not torch.dtype or dtype == torch.bool:  # booleans have their own storage class
        raise Refused("it has a tensor without a dtype")
    return _tensor(reader, stored, offset, size, stride, requires_grad, hooks, metadata, dtype)


def _parameter(reader: Reader, data: Any, requires_grad: Any = True, *rest: Any) -> torch.nn.Parameter:
    """`_rebuild_parameter`, also with a state, which is left out."""
    if type(data) is not torch.Tensor:
        raise Refused("it has a parameter without data")
    return torch.nn.Parameter(data, requires_grad is True)


def _tensor_with_state(reader: Reader, function: Any, kind: Any, arguments: Any, state: Any) -> torch.Tensor:
    """`_rebuild_from_type_v2`: a tensor with attributes, which are left out."""
    if type(function) is not Call or kind not in (_TENSOR, _PARAMETER) or type(arguments) is not tuple:
        raise Refused("it has a tensor of another class than torch.Tensor")
    tensor = function.function(reader, *arguments)
    if not isinstance(tensor, torch.Tensor):
        raise Refused("it has a malformed tensor")
    return tensor


def _sparse(reader: Reader, layout: Any, data: Any) -> torch.Tensor:
    """`_rebuild_sparse_tensor`; PyTorch checks every index."""
    compressed = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    known = layout == torch.sparse_coo or layout in compressed
    parts = 2 if layout == torch.sparse_coo else 3
    if not known or type(data) is not tuple or len(data) <= parts:
        raise Refused("it has a sparse tensor that is malformed")
    if any(type(part) is not torch.Tensor or part.layout != torch.strided for part in data[:parts]):
        raise Refused("it has a sparse tensor without numbers")
    size = _sizes(data[parts])
    if layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(data[0], data[1], size, check_invariants=True)
    return torch.sparse_compressed_tensor(*data[:3], size, layout=layout, check_invariants=True)


def _layout(reader: Reader, name: Any) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch.")) if name in _LAYOUTS else None
    if found is None:
        raise Refused("it has a tensor with an unknown layout")
    return found


_LAYOUTS = ("torch.strided", *(f"torch.sparse_{kind}" for kind in ("coo", "csr", "csc", "bsr", "bsc")))


def _size(reader: Reader, values: Any = ()) -> torch.Size:
    return torch.Size(_sizes(values))


def _device(reader: Reader, kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise Refused("it has a malformed device")
    return torch.device(kind) if index is None else torch.device(kind, index)


# Replacements for mmengine's functions.


def _set_history(reader: Reader, target: _History, state: Any) -> None:
    if type(state) is not dict:
        raise Refused("it has a log history that is malformed")
    target.state = state


def _history(state: dict | None) -> History:
    """The numbers of a HistoryBuffer; its methods, which the pickle also names, are dropped."""
    state = state or {}
    values = [state.get(name, ()) for name in ("_log_history", "_count_history")]
    values = [value.value if type(value) is _Array else value for value in values]
    for value in values:
        if type(value) is np.ndarray and value.ndim == 1:
            continue
        if type(value) not in (list, tuple) or any(type(item) not in (int, float) for item in value):
            raise Refused("it has a log history that is malformed")
    length = state.get("max_length", 1_000_000)
    if len(values[0]) != len(values[1]) or type(length) is not int or not 0 < length < 2**62:
        raise Refused("it has a log history that is malformed")
    return History(values[0][-length:], values[1][-length:], length)


_NDARRAY, _TENSOR, _PARAMETER = Kind("ndarray"), Kind("Tensor"), Kind("Parameter")

_STORAGES = {
    **dict(bool="Bool", uint8="Byte", int8="Char", int16="Short", int32="Int", int64="Long", float16="Half"),
    **dict(
        bfloat16="BFloat16", float32="Float", float64="Double", complex64="ComplexFloat", complex128="ComplexDouble"
    ),
}
"""The dtypes that have a storage class in PyTorch, with the name of the class."""

_MORE = "uint16 uint32 uint64 complex32 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
"""The dtypes without a storage class; PyTorch 2.8 has all of them."""

ALLOWED: dict[str, Any] = {
    "builtins.bytearray": Call(_bytearray),
    "builtins.bytes": Call(_bytes),
    "builtins.complex": Call(_complex),
    "builtins.getattr": Call(lambda reader, *names: None),  # a history uses it to refer to its methods
    "builtins.set": Call(_set),
    "_codecs.encode": Call(_encode),
    "collections.Counter": Call(_counter),
    "collections.OrderedDict": Call(_ordered),
    "mmengine.logging.history_buffer.HistoryBuffer": Call(lambda reader: _History()),
    "numpy.dtype": Call(_numpy_dtype),
    "numpy.ndarray": _NDARRAY,
    "numpy._core.multiarray._reconstruct": Call(_numpy_begun),
    "numpy._core.multiarray.scalar": Call(_numpy_scalar),
    "numpy._core.numeric._frombuffer": Call(_numpy_buffer),
    "torch.Size": Call(_size),
    "torch.Tensor": _TENSOR,
    "torch.device": Call(_device),
    "torch.nn.parameter.Parameter": _PARAMETER,
    "torch.serialization._get_layout": Call(_layout),
    "torch.storage.UntypedStorage": Kind("UntypedStorage"),
    "torch._tensor._rebuild_from_type_v2": Call(_tensor_with_state),
    "torch._utils._rebuild_parameter": Call(_parameter),
    "torch._utils._rebuild_parameter_with_state": Call(_parameter),
    "torch._utils._rebuild_sparse_tensor": Call(_sparse),
    "torch._utils._rebuild_tensor": Call(_tensor),
    "torch._utils._rebuild_tensor_v2": Call(_tensor),
    "torch._utils._rebuild_tensor_v3": Call(_tensor_of_dtype),
    **{f"torch.{name}": getattr(torch, name) for name in (*_STORAGES, *_MORE.split())},
    **{
        f"{module}.{storage}Storage": Kind("storage", getattr(torch, name))
        for module in ("torch", "torch.cuda")
        for name, storage in _STORAGES.items()
    },
}
"""All names that a checkpoint may use, and their replacements; numpy.core means numpy._core, __builtin__ builtins."""

_BUILDERS: dict[type, Callable[[Reader, Any, Any], None]] = {
    collections.OrderedDict: _set_ordered,
    _Array: _set_array,
    _Dtype: _set_dtype,
    _History: _set_history,
}

_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, np.ndarray, torch.Tensor, torch.nn.Parameter)
_LEAVES += (torch.Size, torch.dtype, torch.device, torch.layout)


class _Result:
    """The result, in which every object is now complete, and with bounds on its depth and size."""

    def __init__(self, history: Callable[[Any, Any, int], Any]):
        self.history = history
        self.done: dict[int, tuple[Any, int, int]] = {}

    def of(self, value: Any, depth: int) -> tuple[Any, int, int]:
        """A value's final form, its nesting depth, and the number of its items, including repeated items."""
        kind = type(value)
        if kind in _LEAVES or isinstance(value, np.generic):
            return value, -1, 1
        if id(value) not in self.done:
            self.check(depth, 1)
            self.done[id(value)] = self.made(value, depth)
        self.check(depth + self.done[id(value)][1], self.done[id(value)][2])
        return self.done[id(value)]

    def check(self, depth: int, count: int) -> None:
        if depth > DEPTH:
            raise Refused(f"it holds itself, or lists and dicts that are nested more than {DEPTH} deep")
        if count > OPERATIONS:
            raise Refused(f"it has more than {OPERATIONS:,} items")

    def made(self, value: Any, depth: int) -> tuple[Any, int, int]:
        kind = type(value)
        if kind is _History:
            return self.history(*_history(value.state)), -1, 1
        if kind in (_Array, _Dtype) and value.value is not None:
            return value.value, -1, 1
        if kind not in (dict, collections.OrderedDict, collections.Counter, list, tuple, set, frozenset):
            raise Refused(f"it holds a bare {kind.__name__.strip('_')}, which is neither data nor a tensor")
        mapping = isinstance(value, dict)
        items = [self.of(item, depth + 1) for item in (value.values() if mapping else value)]
        parts = [item[0] for item in items]
        made = kind()
        if not mapping:
            made = kind(parts)
        else:
            dict.update(made, zip(value, parts)) if kind is collections.Counter else made.update(zip(value, parts))
        if hasattr(value, "_metadata"):
            made._metadata = _versions(value._metadata)
        return made, 1 + max((item[1] for item in items), default=-1), 1 + sum(item[2] for item in items)


def _versions(metadata: dict) -> collections.OrderedDict:
    """Only the versions of modules that PyTorch keeps beside a state dict."""
    return collections.OrderedDict(
        (name, {"version": said["version"]})
        for name, said in metadata.items()
        if type(name) is str and type(said) is dict and type(said.get("version")) is int
    )
