"""The `terrazzo` command: one verb per file."""
