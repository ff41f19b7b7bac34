"""A model looked at without running it: its operations traced on shapes alone, then counted, described or explained.

`trace` records operations, `measure` adds them up, `costs` asks each operator which backend runs, `description` is what
`terrazzo info` says. `timing` measures functions in turns.
"""
