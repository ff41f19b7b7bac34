"""From a picture to a record and a drawing.

A predictor is a function of a picture. There are predictors for a timm classifier (`classifiers`), a config's model
(`openmmlab`) and an exported file (`files`, through `terrazzo.tools.runtimes`). All give a `prediction.Prediction`;
`draw` draws.
"""
