"""A checked float32 ONNX file in, a file in FP16 or INT8 out.

`half` and `low` rewrite graphs, `sensitivity` ranks layers by their error, `file_metric` is the metric of a file on a
config's data, and `lowering` keeps as few layers in float32 as the metric allows. `engine` does so for TensorRT.
"""
