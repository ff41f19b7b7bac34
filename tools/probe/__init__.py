"""What a frozen backbone's features are good for, measured by something small that is trained on them.

A probe takes a model, mechanisms that change it (`terrazzo.tools.mechanisms`), and data. The pictures go through the
frozen model once (`features`), the maps are kept, a small head learns from them (`linear`), and the validation split
gives figures, which become rows of `terrazzo.tools.results` and a picture. Each kind of probe is a file with a click
command: so far `segmentation`.
"""
