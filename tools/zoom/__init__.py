"""The gated zoom on the command line.

`options` are what `infer` and `test` share, and make a `terrazzo.gated_zoom.Zoom` of a config's model. `meter` counts
pixels and time while a model is evaluated. `sweep` evaluates many budgets at once, with an oracle by `gains`, and
`curve` draws them. `labels` reads the label maps of a config's data, from which `terrazzo zoom oracle` computes what
tiles could gain.
"""
