"""File formats: each writes a traced module, and opens what it wrote through `terrazzo.tools.runtimes`."""
