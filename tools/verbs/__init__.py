"""The verbs of the `terrazzo` command: each file holds a click command, and no verb needs another verb."""
