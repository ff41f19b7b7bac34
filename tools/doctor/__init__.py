"""Which parts of another project work here: mmdet's and mmseg's configs, each built in a separate process."""
