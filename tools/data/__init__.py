"""What a user brings, and what stands in for it: pictures, checks of a config's data, made-up terrazzo floors.

Files come in here and leave as pictures, or as an InputError of one line. Nothing here knows a model.
"""
