"""From rows of results to the tables of README.md, docs/ and the model cards."""
