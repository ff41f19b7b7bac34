"""Speed as ratios to named peers of one run.

`registry` names what can be measured. Each benchmark gives cases, measures one, and turns rows of
`terrazzo.tools.results` into a table and verdicts.
"""
