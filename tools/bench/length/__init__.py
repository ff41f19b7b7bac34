"""`terrazzo bench length`: time, memory and multiply-adds of models and mixers by the number of tokens.

`subject` builds what is measured for a number of tokens; `probe` measures it in a process of its own, whose death for
lack of memory is an answer; `benchmark` is the command.
"""
