"""`terrazzo bench lra`: every mixer learns the same task with the same recipe in the same time.

`tasks` makes or reads the data of a task and scores answers; `hosts` puts a mixer into a small ViT or pyramid with a
head for the task; `training` trains for a time; `benchmark` is the command.
"""
