"""The verbs of the `terrazzo` command: each file holds a click command and nothing that another verb needs."""
