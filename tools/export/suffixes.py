"""Which format a file's suffix names."""

from pathlib import Path

from terrazzo.errors import InputError

SUFFIXES = {
    **{"onnx": (".onnx",), "tensorrt": (".engine", ".onnx"), "openvino": (".xml",)},
    **{"pt2": (".pt2",), "aoti": (".pt2",)},
}
"""The formats, and the suffixes that a user may give their files."""


def format_for(out: Path | None) -> str:
    """The first format with the file's suffix, or "onnx" without a file; InputError for an unknown suffix."""
    if out is None:
        return "onnx"
    for name, suffixes in SUFFIXES.items():
        if out.suffix == suffixes[0]:
            return name
    known = list(dict.fromkeys(suffixes[0] for suffixes in SUFFIXES.values()))
    raise InputError(f"{out} must end in {', '.join(known[:-1])} or {known[-1]}, which say the format")


def check_suffix(out: Path, name: str) -> None:
    """InputError if a file of this format cannot have this suffix."""
    if out.suffix not in SUFFIXES[name]:
        raise InputError(f"{out} must end in {' or '.join(SUFFIXES[name])}, because --format is {name}")
