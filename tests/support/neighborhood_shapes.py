"""Problems on which every form of neighborhood attention is tested: size, kernel, dilation."""

# Tiles of the fused form are 4 x 8, 8 x 8, 8 x 4 or 16 x 4.
QUICK = [
    ((7, 7), 7, 1),  # map = kernel: one class, dense
    ((14, 7), 7, (2, 1)),  # map = kernel x dilation: grid attention
    ((6, 9), 3, (2, 3)),
    ((8, 7), 7, 1),
    ((7, 8), 7, 1),
    ((9, 9), 7, 1),
    ((14, 15), 7, 2),  # kernel x dilation and one more: classes of two lengths
    ((17, 15), 7, 1),  # twice the tile, one more and one less
    ((16, 17), 5, 1),
    ((15, 16), 2, 1),
    ((17, 19), (9, 7), (1, 2)),  # awkward shapes from NATTEN's tests
    ((15, 20), (5, 15), (3, 1)),
    ((11, 14), (6, 4), (1, 3)),  # even kernels
    ((17, 14), (4, 3), (4, 4)),  # an axis has a remainder of 1, 2 or dilation - 1
    ((15, 19), 3, (4, 5)),
    ((13, 12), 11, 1),  # tiles of 4 columns
]
LARGE = [
    ((19, 29), 8, (2, 3)),
    ((23, 25), 7, 1),
    ((31, 33), 7, 1),
    ((29, 31), 7, (4, 2)),
    ((31, 29), 7, (4, 3)),
    ((28, 46), (11, 13), 1),
    ((84, 19), (7, 3), (5, 1)),
    ((33, 20), 6, (5, 3)),
    ((56, 56), 7, (2, 4)),
    ((64, 30), (21, 29), (3, 1)),
]
