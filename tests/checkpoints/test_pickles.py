"""The reader of checkpoints: it accepts plain data, and refuses attacks in one line without killing the process."""

import collections
import contextlib
import io
import pathlib
import pickle
import pickletools
import struct
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from terrazzo.checkpoints import _archives, _pickles, files
from terrazzo.errors import InputError
from terrazzo.openmmlab.checkpoint import load_file, plain, save_checkpoint

OLD = {"_use_new_zipfile_serialization": False}

NAMES = {
    *("builtins.bytearray", "builtins.bytes", "builtins.complex", "builtins.getattr", "builtins.set", "_codecs.encode"),
    *("collections.Counter", "collections.OrderedDict", "mmengine.logging.history_buffer.HistoryBuffer"),
    *("numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"),
    *("numpy._core.numeric._frombuffer", "torch.Size", "torch.Tensor", "torch.device"),
    *("torch.nn.parameter.Parameter", "torch.serialization._get_layout", "torch.storage.UntypedStorage"),
    *("torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter"),
    *("torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_sparse_tensor"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
    *(f"torch.{name}" for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")),
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "complex32", "complex64")),
    *(f"torch.{name}" for name in ("complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")),
    *("torch.float8_e5m2fnuz", "torch.float8_e8m0fnu"),
    *(
        f"{module}.{name}Storage"
        for module in ("torch", "torch.cuda")
        for name in (
            *("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double"),
            *("ComplexFloat", "ComplexDouble"),
        )
    ),
}


def test_allowed_names_are_these():
    assert set(_pickles.ALLOWED) == NAMES


def test_names_stand_for_functions_of_the_reader_alone():
    """So arguments from a file reach no class or function of Python, NumPy or PyTorch."""
    for name, value in _pickles.ALLOWED.items():
        if isinstance(value, _pickles.Call):
            assert value.function.__module__ == _pickles.__name__, name
        else:
            assert isinstance(value, (_pickles.Kind, torch.dtype)), name


# Accepted files.

TENSOR = torch.arange(20.0).reshape(4, 5)
VALUES = {
    "tensor": TENSOR,
    "view": TENSOR.t()[1:3],
    "expanded": torch.ones(1).expand(1000),
    "empty": torch.zeros(0, 3),
    "number": torch.tensor(3),
    "truth": torch.tensor([True, False]),
    "half": TENSOR.half(),
    "bfloat16": TENSOR.bfloat16(),
    "complex_tensor": torch.tensor([1 + 2j]),
    "gradient": torch.ones(2, requires_grad=True),
    "parameter": torch.nn.Parameter(TENSOR, requires_grad=False),
    "sparse": torch.eye(3).to_sparse(),
    "array": np.arange(6.0).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">f4"),
    "half_array": np.ones(2, np.float16),
    "truths": np.array([True, False]),
    "complex_array": np.ones(2, complex),
    "no_dimension": np.array(3.5),
    "no_items": np.zeros((0, 2)),
    "scalar": np.float32(0.5),
    "big_scalar": np.array(7, ">i4")[()],
    "dtype": np.dtype(">f4"),
    "set": {1, 2},
    "bytes": b"abc\xff",
    "no_bytes": b"",
    "bytearray": bytearray(b"x"),
    "complex": 1 + 2j,
    "counter": collections.Counter({3: 1}),
    "ordered": collections.OrderedDict(a=1),
    "torch_dtype": torch.float16,
    "device": torch.device("cuda", 1),
    "size": torch.Size([2, 3]),
    "long": 2**70,
    "text": "ü",
    "nested": (1, [2.5, None, {"a": (True,)}]),
    "key": {(1, "a"): 2, None: 3},
}


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, (np.ndarray, np.generic)):
        return a.shape == b.shape and a.dtype.newbyteorder("=") == b.dtype and np.array_equal(a, b)
    return a == b


@pytest.mark.parametrize("options", [{}, OLD, {"pickle_protocol": 3}, {"pickle_protocol": 5}], ids=str)
def test_plain_values_come_back(options, tmp_path):
    torch.save(VALUES, tmp_path / "x.pth", **options)
    loaded = load_file(tmp_path / "x.pth")
    assert list(loaded) == list(VALUES)
    assert [name for name in VALUES if not same(VALUES[name], loaded[name])] == []
    loaded["array"][0, 0] = 5  # a separate copy
    loaded["tensor"][0, 0] = 5


def test_types_without_a_storage_class(tmp_path):
    values = {name: torch.tensor([1, 2]).to(getattr(torch, name)) for name in ("uint16", "float8_e5m2")}
    for options in ({}, OLD):
        torch.save(values, tmp_path / "x.pth", **options)
        for name, value in load_file(tmp_path / "x.pth").items():
            assert value.dtype == getattr(torch, name)
            assert value.float().tolist() == [1, 2]


def test_shared_memory_stays_shared_and_versions_stay(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    state["tied"] = state["0.weight"]
    for options in ({}, OLD):
        torch.save(state, tmp_path / "x.pth", **options)
        loaded = load_file(tmp_path / "x.pth")
        assert loaded["tied"].data_ptr() == loaded["0.weight"].data_ptr()
        assert loaded._metadata["1"] == {"version": 2}


def test_tensors_of_classes_and_with_attributes(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "x"
    torch.save({"p": parameter}, tmp_path / "x.pth")
    loaded = load_file(tmp_path / "x.pth")["p"]
    assert type(loaded) is torch.nn.Parameter
    assert not hasattr(loaded, "note")


def test_history_becomes_mmengines(tmp_path):
    torch.save({"h": HistoryBuffer([1.0, 2.0], [1, 1]), "none": HistoryBuffer()}, tmp_path / "x.pth")
    loaded = load_file(tmp_path / "x.pth")
    assert loaded["h"].data[0].tolist() == [1, 2]
    assert loaded["h"].mean() == 1.5
    assert len(loaded["none"].data[0]) == 0


def test_history_without_mmengine_is_plain(tmp_path):
    torch.save({"h": HistoryBuffer([1.0, 2.0], [1, 3], 5)}, tmp_path / "x.pth")
    history = files.load_file(tmp_path / "x.pth")["h"]
    assert type(history) is _pickles.History
    assert (history.log.tolist(), history.count.tolist(), history.max_length) == ([1, 2], [1, 3], 5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "map_location",
    [
        "meta",
        torch.device("meta"),
        {"cpu": "meta"},
        lambda storage, location: torch.UntypedStorage(len(storage), device="meta"),
    ],
    ids=["text", "device", "dict", "function"],
)
def test_map_location(map_location, suffix, tmp_path):
    path = str(tmp_path / f"x{suffix}")
    save_checkpoint({"state_dict": {"a": torch.ones(2, 3)}}, path)
    for place, device in ((map_location, "meta"), ({"other": "meta"}, "cpu"), (lambda storage, location: None, "cpu")):
        loaded = load_file(path, place)
        tensor = loaded.get("state_dict", loaded)["a"]
        assert (tensor.device.type, tensor.shape) == (device, (2, 3))


def test_strings_of_python_2(tmp_path):
    """Pickles of Python 2 hold text and arrays' numbers as bytes."""
    array = python_2_array(b"f8", b"\0\0\0\0\0\0\xf0\x3f")
    assert load(tmp_path, b"}" + short(b"name") + short(b"value") + b"s" + short(b"a") + array + b"s") == {
        "name": "value",
        "a": np.ones(1),
    }


# Refused files. Pickles are written by hand, opcode by opcode.


def short(text):
    return b"U" + bytes([len(text)]) + text


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(full):
    module, _, last = full.rpartition(".")
    return b"c" + f"{module}\n{last}\n".encode()


def of(*parts):
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def whole(value):
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def calls(function, *arguments):
    return name(function) + of(*arguments) + b"R"


def coded(data):
    return calls("_codecs.encode", text(data.decode("latin-1")), text("latin1"))


def dtype(code="f8", order="<", *state):
    rest = of(whole(3), text(order), *(state or (b"N", b"N", b"N")), whole(-1), whole(-1), whole(0))
    return calls("numpy.dtype", text(code), b"\x89", b"\x88") + rest + b"b"


def array(shape, data, kind=None, fortran=b"\x89"):
    return BEGUN + of(whole(1), shape, kind or dtype(), fortran, data) + b"b"


def python_2_array(code, data):
    begun = calls("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), of(whole(0)), short(b"b"))
    kind = calls("numpy.dtype", short(code), whole(0), whole(1))
    return begun + of(whole(1), of(whole(len(data) // 8)), kind, b"\x89", short(data)) + b"b"


def storage(kind="torch.FloatStorage", key="0", count=4):
    return of(text("storage"), name(kind), text(key), text("cpu"), whole(count)) + b"Q"


def tensor(offset, size, stride, kind="torch.FloatStorage", function="torch._utils._rebuild_tensor_v2"):
    shape = (of(*map(whole, part)) for part in (size, stride))
    empty = calls("collections.OrderedDict")
    return calls(function, storage(kind), whole(offset), *shape, b"\x89", empty)


def archive(tmp_path, body, storages=(b"\x09" + b"\0" * 15,), compression=zipfile.ZIP_STORED, extra=()):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", compression) as parts:
        parts.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        for number, data in enumerate(storages):
            parts.writestr(f"archive/data/{number}", data)
        for part, data in extra:
            parts.writestr(part, data)
    return path


def load(tmp_path, body, **options):
    return load_file(archive(tmp_path, body, **options))


BEGUN = calls("numpy._core.multiarray._reconstruct", name("numpy.ndarray"), of(whole(0)), coded(b"b"))
HISTORY = name("mmengine.logging.history_buffer.HistoryBuffer") + b")\x81"
EIGHT = coded(b"AAAAAAAA")
HUGE = whole(2**62)
NESTED = b")" + b"\x85" * 100_000  # a tuple in a tuple in ...

ATTACKS = {
    "only arrays of plain numbers are read": {
        "objects, and a short list": array(of(whole(3)), b"](" + b"K\x01K\x02e", dtype("O8", "|")),
        "objects, from bytes": calls("numpy.ndarray", of(whole(1)), dtype("O8", "|"), EIGHT),
        "scalar of objects": calls("numpy._core.multiarray.scalar", dtype("O8", "|"), EIGHT),
        "scalar of a record": calls("numpy._core.multiarray.scalar", dtype("V8", "|"), EIGHT),
        "scalar of records of objects": calls(
            "numpy._core.multiarray.scalar", dtype("f8", "|", b"N", of(text("a")), b"}" + text("a") + b"Ns"), EIGHT
        ),
        "flags of a dtype": calls("numpy.dtype", text("f8"), b"\x89", b"\x88")
        + of(whole(3), text("|"), of(dtype(), of(whole(2))), b"N", b"N", whole(8), whole(1), whole(255))
        + b"b",
        "dtype of fields": array(of(whole(1)), EIGHT, dtype("f4,O")),
        "dtype of text": array(of(whole(1)), EIGHT, dtype("U2")),
        "dtype of dates": array(of(whole(1)), EIGHT, dtype("M8[s]")),
        "dtype of long doubles": array(of(whole(1)), coded(b"A" * 16), dtype("f16")),
        "dtype of a dict": array(of(whole(1)), EIGHT, calls("numpy.dtype", b"}", b"\x89", b"\x88")),
    },
    "its pickle calls a": {
        "memory that was not set": calls("numpy.ndarray", of(whole(8)), dtype()),
        "new tensor": name("torch.Tensor") + b")\x81",
        "calls a number": b"K\x01)R",
        "calls with a list": name("builtins.set") + b"]R",
    },
    "which do not fit": {
        "scalar of the first of two": calls("numpy._core.multiarray.scalar", dtype(), coded(b"A" * 16)),
        "scalar of no bytes": calls("numpy._core.multiarray.scalar", dtype(), coded(b"")),
        "array larger than its bytes": array(of(whole(2)), EIGHT),
        "array smaller than its bytes": array(of(whole(1)), coded(b"A" * 9)),
        "array whose size overflows": array(of(whole(2**61), whole(8)), coded(b"")),
        "array of 33 dimensions": array(of(*[whole(1)] * 33), EIGHT),
        "array from a buffer of another size": calls(
            "numpy._core.numeric._frombuffer", EIGHT, dtype(), of(whole(2)), text("C")
        ),
    },
    "NumPy type that is malformed": {
        "dtype without an order": array(of(whole(1)), EIGHT, dtype("f8", "x")),
    },
    "with numbers that are not bytes": {
        "dtype that is text": array(of(whole(1)), EIGHT, text("f8")),
        "array without bytes": array(of(whole(1)), b"N"),
    },
    "it holds a bare": {
        "array without its state": BEGUN,
        "storage alone": storage(),
        "class alone": name("torch.FloatStorage"),
        "function alone": name("builtins.getattr"),
    },
    "NumPy array of another class": {
        "array of another class": calls(
            "numpy._core.multiarray._reconstruct", name("torch.Tensor"), of(whole(0)), coded(b"b")
        ),
    },
    "negative, too large or not a whole number": {
        "array of huge shape": array(of(HUGE, HUGE), coded(b"")),
        "array of a negative size": array(of(whole(-1), whole(-1)), EIGHT),
        "array of a fraction": array(of(b"G" + struct.pack(">d", 1.0)), EIGHT),
        "array with a truth value as size": array(of(b"\x88"), EIGHT),
        "before the storage": tensor(-1, (1,), (1,)),
        "backwards": tensor(3, (2,), (-1,)),
        "a negative size": tensor(0, (-1,), (1,)),
    },
    "NumPy array that is malformed": {
        "array with a state that is no tuple": BEGUN + b"]b",
        "array with a state that is short": BEGUN + of(whole(1), whole(1)) + b"b",
    },
    "log history that is malformed": {
        "history of text": HISTORY + b"}" + text("_log_history") + text("abc") + b"sb",
        "history of two lengths": HISTORY + b"}" + text("_log_history") + b"]K\x01as" + b"b",
        "history of objects": HISTORY
        + b"}("
        + b"".join(text(key) + b"]]a" for key in ("_log_history", "_count_history"))
        + b"ub",
        "history of no length": HISTORY + b"}" + text("max_length") + whole(-1) + b"sb",
        "history of a list": HISTORY + b"]b",
        "history in two dimensions": HISTORY
        + b"}"
        + text("_log_history")
        + array(of(whole(1), whole(1)), EIGHT)
        + b"sb",
    },
    "does not fit into its": {
        "past the storage": tensor(0, (5,), (1,)),
        "past the storage by its offset": tensor(4, (1,), (1,)),
        "past the storage by its stride": tensor(0, (2,), (4,)),
        "sizes without strides": tensor(0, (1, 1), (1,)),
        "size that overflows": tensor(0, (2**32, 2**32), (0, 0)),
        "strides that overflow": tensor(0, (3,), (2**61,)),
        "empty, of a huge size": tensor(0, (2**40, 2**40, 0), (1, 1, 1)),
        "doubles in the bytes of floats": tensor(0, (3,), (1,), kind="torch.DoubleStorage"),
    },
    "far larger than the file": {
        "stride that repeats one number": tensor(0, (2**40,), (0,)),
    },
    "tensor without data": {
        "tensor of no storage": calls("torch._utils._rebuild_tensor_v2", b"N", whole(0), of(), of(), b"\x89", b"N"),
        "untyped storage": tensor(0, (1,), (1,), kind="torch.storage.UntypedStorage"),
    },
    "tensor without a dtype": {
        "truth values in other bytes": calls(
            "torch._utils._rebuild_tensor_v3",
            storage(),
            whole(0),
            of(whole(1)),
            of(whole(1)),
            b"\x89",
            b"N",
            name("torch.bool"),
        ),
        "tensor of a class that is data": calls(
            "torch._utils._rebuild_tensor_v3", storage(), whole(0), of(), of(), b"\x89", b"N", name("torch.Tensor")
        ),
    },
    "sets the state of a": {
        "tensor set by a state": tensor(0, (1,), (1,)) + of(storage(), whole(0), of(whole(9)), of(whole(1))) + b"b",
        "state of a function": name("builtins.getattr") + b"}" + text("function") + b"Nsb",
        "state of a class": name("mmengine.logging.history_buffer.HistoryBuffer") + b"N}" + text("x") + b"Ns\x86b",
        "state of a dict": b"}}b",
    },
    "a malformed tensor": {
        "tensor by another function": calls(
            "torch._tensor._rebuild_from_type_v2", name("torch.Size"), name("torch.Tensor"), of(), b"}"
        ),
    },
    "another class than torch.Tensor": {
        "tensor of another class": calls("torch._tensor._rebuild_from_type_v2", name("torch.Size"), b"N", of(), b"}"),
    },
    "parameter without data": {
        "parameter of a number": calls("torch._utils._rebuild_parameter", whole(1), b"\x88", b"N"),
    },
    "found index 9": {
        "sparse, past its size": calls(
            "torch._utils._rebuild_sparse_tensor",
            calls("torch.serialization._get_layout", text("torch.sparse_coo")),
            of(
                tensor(0, (1, 1), (1, 1), kind="torch.LongStorage"),
                tensor(0, (1,), (1,), kind="torch.LongStorage"),
                of(whole(2)),
            ),
        ),
    },
    "sparse tensor without numbers": {
        "sparse, of arrays": calls(
            "torch._utils._rebuild_sparse_tensor",
            calls("torch.serialization._get_layout", text("torch.sparse_coo")),
            of(array(of(whole(1)), EIGHT), array(of(whole(1)), EIGHT), of(whole(2))),
        ),
    },
    "unknown layout": {
        "layout by any name": calls("torch.serialization._get_layout", text("torch.load")),
    },
    "lacks the data of a tensor": {
        "storage that is not there": tensor(0, (1,), (1,)).replace(text("0"), text("../0")),
    },
    "something other than a tensor's data": {
        "data that is no storage": of(text("module"), name("torch.Tensor"), text("0"), text("cpu"), whole(4)) + b"Q",
        "storage of text": of(text("storage"), text("x"), text("0"), text("cpu"), whole(4)) + b"Q",
    },
    "it is not a checkpoint that can be read": {
        "too many arguments": calls("builtins.set", b"]", b"]"),
        "nothing on the stack": b"b",
        "no mark": b"t",
        "memo that is not there": b"h\x05",
        "text that ends too soon": b"X\xff\xff\xff\xff",
    },
    "another way than latin1": {
        "codec other than latin1": calls("_codecs.encode", text("x"), text("rot13")),
    },
    "a key or an item of a set": {
        "key that is a list": b"}]Ns",
        "deep key": b"}" + NESTED + b"Ns",
        "long key of keys": b"}" + b"(" + b"K\x01" * 101 + b"tNs",
        "deep item of a set": b"\x8f(" + NESTED + b"\x90",
    },
    "nested more than 100 deep": {
        "deep": NESTED,
        "deep list": b"]" * 100_000 + b"a" * 99_999,
        "in itself": b"]q\0h\0a",
        "dict in itself": b"}q\0" + text("a") + b"h\0s",
    },
    "10,000,000 items": {
        "doubled sixty times": b")" + b"q\0h\0\x86" * 60,
    },
    "appends to a": {
        "appends to a tuple": b")K\x01a",
    },
    "sets items of a": {
        "item of a tensor": tensor(0, (4,), (1,)) + whole(0) + whole(9) + b"s",
        "item of a list": b"]K\0K\x01s",
    },
    "and checkpoints do not": {
        "huge number": b"\x8b" + struct.pack("<i", 2**20) + b"\xff" * 2**20,
        "number as text": b"I123\n",
        "object by number": b"P0\n",
        "extension": b"\x82\x01",
        "instance of old": b"(ios\nsystem\n",
        "new with keywords": name("builtins.set") + b")}\x92",
    },
    "other than plain data": {
        "eval": calls("builtins.eval", text("1")),
        "function of a method": name("builtins.getattr.x"),
        "name from the stack": text("posix") + text("system") + b"\x93",
    },
    "by something other than text": {
        "name that is no text": b"K\x01K\x02\x93",
    },
}
"""Pickles by the text of their refusal."""


def refusal(path):
    with pytest.raises(InputError) as caught:
        load_file(path)
    line = str(caught.value)
    assert "x.pth' is refused: " in line
    assert "\n" not in line
    assert len(line) < 700
    assert "weights_only" not in line
    return line


@pytest.mark.parametrize(("words", "attack"), [(words, attack) for words in ATTACKS for attack in ATTACKS[words]])
def test_attack_ends_in_one_line(words, attack, tmp_path):
    path = archive(tmp_path, ATTACKS[words][attack])
    begun = time.perf_counter()
    assert words in refusal(path)
    assert time.perf_counter() - begun < 5


def test_attributes_are_left_out(tmp_path):
    state = b"}(" + text("__class__") + whole(0) + text("_metadata") + b"]" + text("update") + b"N" + b"ub"
    loaded = load(tmp_path, calls("collections.OrderedDict") + state)
    assert type(loaded) is collections.OrderedDict
    assert not vars(loaded)
    metadata = (
        b"}(" + text("a") + b"}" + text("version") + text("x") + b"s" + text("b") + b"}" + text("version") + b"K\1su"
    )
    loaded = load(tmp_path, calls("collections.OrderedDict") + b"}" + text("_metadata") + metadata + b"sb")
    assert loaded._metadata == {"b": {"version": 1}}


CASES = sorted((pathlib.Path(__file__).parents[3] / "shared" / "cases" / "checkpoints").glob("*.pth"))


@pytest.mark.parametrize(
    "path", CASES or [pytest.param(None, marks=pytest.mark.skip("no cases beside the repository"))]
)
def test_known_cases(path):
    with pytest.raises(InputError, match="is refused: it holds a NumPy array of type 'O8'"):
        load_file(path)


def test_every_unknown_name_is_said_once_and_cannot_draw(tmp_path):
    body = b"](" + name("os.system") + name("a.\x1b[2Jb") + b"".join(name(f"z.z{n}") for n in range(99)) + b"e"
    line = refusal(archive(tmp_path, body))
    assert "os.system" in line
    assert r"a.\x1b[2Jb" in line
    assert line.count("z.z") < 20


def test_truth_values_are_0_and_1(tmp_path):
    loaded = load(tmp_path, tensor(0, (4,), (1,), kind="torch.BoolStorage"), storages=[b"\0\1\2\xff"])
    assert loaded.view(torch.uint8).tolist() == [0, 1, 1, 1]
    loaded = load(tmp_path, array(of(whole(3)), coded(b"\0\2\xff"), dtype("b1", "|")))
    assert loaded.view(np.uint8).tolist() == [0, 1, 1]


def test_a_users_names_do_not_widen_and_survive(tmp_path):
    class Mine:
        pass

    entries = [Mine, (eval, "builtins.eval"), (np.ndarray, "numpy.ndarray")]
    with torch.serialization.safe_globals(entries):
        before = torch.serialization.get_safe_globals()
        refusal(archive(tmp_path, calls("builtins.eval", text("1"))))
        refusal(archive(tmp_path, calls("numpy.ndarray", of(whole(8)), dtype())))
        assert set(torch.serialization.get_safe_globals()) == set(before) >= set(entries)


# Sizes.


def test_compressed_archives_are_refused(tmp_path):
    path = archive(tmp_path, tensor(0, (4,), (1,)), storages=[b"\0" * 2**24], compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**16
    assert "compress" in refusal(path)


def test_parts_that_overlap_are_refused(tmp_path):
    """Many entries of the archive's directory may name the same bytes."""
    path = archive(tmp_path, b"N", storages=[b"\0" * 2**16])
    data = path.read_bytes()
    start = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    entry, copies = data[start:end], 100
    entries = b"".join(entry.replace(b"archive/data/0", b"archive/dat%03d" % n) for n in range(copies))
    total = data[end : end + 8] + struct.pack(
        "<HHI", 2 + copies, 2 + copies, end - data.index(b"PK\x01\x02") + len(entries)
    )
    path.write_bytes(data[:end] + entries + total + data[end + 16 :])
    assert "larger than the file" in refusal(path)


def test_pickle_has_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(_archives, "PICKLE_BYTES", 2**20)
    assert "its pickle has more than 1 MiB" in refusal(archive(tmp_path, b"N0" * 2**20 + b"N"))
    monkeypatch.setattr(_pickles, "OPERATIONS", 1000)
    assert "1,000 operations" in refusal(archive(tmp_path, b"K\1q\0" * 1000))


def test_bytes_that_are_made_again_and_again(tmp_path):
    again = name("_codecs.encode") + of(b"h\1", text("latin1")) + b"R"
    body = text("A" * 2**20) + b"q\x01\x85](" + again * 200 + b"e\x86"
    assert "far larger than the file" in refusal(archive(tmp_path, body))


# Formats.


def old(tmp_path, body, keys=("0",), storages=((4, b"\0" * 16),)):
    path = tmp_path / "x.pth"
    machine = {"protocol_version": 1001, "little_endian": sys.byteorder == "little", "type_sizes": {}}
    parts = [pickle.dumps(value, 2) for value in (_archives._MAGIC, 1001, machine)]
    parts += [b"\x80\x02" + body + b".", pickle.dumps(list(keys), 2)]
    parts += [struct.pack("<q", count) + data for count, data in storages]
    path.write_bytes(b"".join(parts))
    return path


def old_tensor(count=4, key="0", view=b"N"):
    said = of(text("storage"), name("torch.FloatStorage"), text(key), text("cpu"), whole(count), view) + b"Q"
    return calls("torch._utils._rebuild_tensor_v2", said, whole(0), of(whole(4)), of(whole(1)), b"\x89", b"N")


def test_old_format_by_hand(tmp_path):
    assert load_file(old(tmp_path, old_tensor())).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (old_tensor(3), {}),
        (old_tensor(2**40), {}),
        (old_tensor(), {"storages": [(4, b"\0" * 15)]}),
        (old_tensor(), {"storages": [(5, b"\0" * 20)]}),
        (old_tensor(), {"storages": []}),
        (old_tensor(), {"keys": []}),
        (old_tensor(), {"keys": ["1"]}),
        (old_tensor(), {"keys": ["0", "0"]}),
        (old_tensor(), {"keys": [1]}),
        (old_tensor(view=of(text("1"), whole(2), whole(2))), {}),
        (b"](" + old_tensor() + old_tensor(8) + b"e", {}),
        (calls("numpy.ndarray", of(whole(1)), dtype("O8", "|"), EIGHT), {"keys": [], "storages": []}),
    ],
)
def test_old_format_refuses(body, options, tmp_path):
    refusal(old(tmp_path, body, **options))


def test_other_files(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"")
    assert "it is empty" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "not one that torch.save wrote" in refusal(path)
    with tarfile.open(path, "w") as parts:
        parts.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refusal(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    assert "TorchScript" in refusal(path)
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("readme.txt", "x")
    assert "not one that torch.save wrote" in refusal(path)
    archive(tmp_path, b"N", extra=[("archive/byteorder", b"big")])
    assert "endian" in refusal(path)
    path.write_bytes(path.read_bytes()[:200])
    assert "cut short or damaged" in refusal(path)


def test_quantised_nested_and_other_tensors_are_named(tmp_path):
    for value, word in (
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.strided), "_rebuild_nested_tensor"),
        (torch.ones(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.ones(2, dtype=torch.cfloat).conj(), "conjugate"),
    ):
        torch.save(value, tmp_path / "x.pth")
        assert word in refusal(tmp_path / "x.pth")


def test_what_is_saved_can_be_read(tmp_path):
    """The reader takes any depth and any keys that were saved."""
    deep = value = []
    for _ in range(5000):
        value.append([])
        value = value[0]
    content = {"deep": deep, frozenset({1}): 1, (1, (2, (3, (4, (5,))))): 2, torch.float32: 3, np.int64(4): 4}
    save_checkpoint(content, str(tmp_path / "x.pth"))
    loaded = load_file(tmp_path / "x.pth")
    assert {"deep", "frozenset({1})", "(1, (2, (3, (4, (5,)))))", torch.float32, 4} == set(loaded)
    assert plain(loaded)


def test_random_pickles_end_in_a_refusal_or_a_value(tmp_path):
    """Pickles are random sequences of the opcodes and objects that the reader knows."""
    random = np.random.default_rng(0)
    pieces = [
        code.code.encode("latin-1")
        for code in pickletools.opcodes
        if code.name in _pickles._ACTIONS and code.arg is None
    ]
    pieces += [name(full) for full in sorted(NAMES)] * 2 + [
        *(body for group in ATTACKS.values() for body in group.values())
    ]
    pieces += [text("a"), EIGHT, dtype(), tensor(0, (2,), (1,)), whole(3), of(whole(1)), HISTORY]
    pieces = [piece for piece in pieces if len(piece) < 1000 and piece != b"."]
    for _ in range(500):
        body = b"".join(pieces[index] for index in random.integers(0, len(pieces), 12))
        with contextlib.suppress(InputError):
            load(tmp_path, body)
