"""Checkpoint files, read and written without mmengine: timm models and the OpenMMLab bridge share this package.

`files` opens a file and refuses whatever could run code; `_archives` reads the formats of `torch.save`, and `_pickles`
reads the objects in them. `loading` loads a file's weights into a model.
"""
