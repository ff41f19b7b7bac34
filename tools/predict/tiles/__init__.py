"""Pictures in tiles: each runs through the model at the picture's own resolution, and the results are put together.

`grid` says where tiles lie and which pixels are whose. Segmentors run in `segments`: with hard seams or blended
(`labels`), or exactly, with an overlap from the model's reach (`reach`) or by rows of layers (`rows`). Restorers run in
`pixels`, and `stitching` puts the values of both together. Detectors run in `boxes`. `engine` chooses between them.
`output` writes the results of pictures that are larger than memory.
"""
