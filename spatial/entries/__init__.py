"""Entries of modules, one file for the classes of a module of Python; see `terrazzo.spatial._entries`."""
