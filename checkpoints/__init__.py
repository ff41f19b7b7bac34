"""Files of weights, read and written without mmengine: what a model of timm and the OpenMMLab bridge share.

`files` opens a file and refuses what could run code; `_archives` knows the formats of `torch.save`, `_pickles` the
objects in them. `loading` puts what a file holds into a model.
"""
