"""From a picture to a record and a drawing.

`predictor.Predictor`, which is `terrazzo.Predictor`, reads pictures and passes them to an engine: a timm classifier
(`classifiers`), a config's model (`openmmlab`) or an exported file (`files`, through `terrazzo.tools.runtimes`). All
give a `prediction.Prediction`; `draw` draws.
"""
