"""From a picture to a record and a drawing.

A predictor is a function of a picture: of a timm classifier (`classifiers`), of a config's model (`openmmlab`) or of an
exported file (`files`, through `terrazzo.tools.runtimes`). All give a `prediction.Prediction`; `draw` draws.
"""
