"""The `terrazzo` command, by what a user does.

`cli` finds a verb in `verbs`, and a verb calls the other packages. A package imports only packages below it. From the
bottom up they are: the files of this folder, `data`, `inspect`, `runtimes`, `predict`, `export`, `training`, `probe`,
`bench`, `reports`, `doctor` and `verbs`.
"""
