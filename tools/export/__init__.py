"""From a model to a file that is proven to compute the same.

`targets` makes what the user named ready (`exportable`, `detectors`), a form of `formats` or `tensorrt` writes it, and
`checked` compares it with PyTorch by `parity` before it gets its name. `precision` lowers a checked ONNX file to FP16
or INT8. `run` has the steps of `terrazzo export`.
"""
