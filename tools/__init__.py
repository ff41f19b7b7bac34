"""The `terrazzo` command, by what a user does.

`cli` finds a verb in `verbs`, and a verb calls rooms. A room knows only rooms below it. From the ground up they are:
the files of this folder, `data`, `inspect`, `runtimes`, `predict`, `export`, `training`, `bench`, `reports`, `doctor`
and `verbs`.
"""
