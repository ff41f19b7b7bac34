"""What every operator does with a call before a form computes it.

A call is checked (`arguments`), then a form is chosen (`operator`, by the rules of `backend`). An exporter sees
standard operations (`exporting`). Where PyTorch cannot look into a form, it sees one op with a gradient (`opaque`).
`dtypes` says in which precision a form computes. Nothing here knows a particular operator.
"""
