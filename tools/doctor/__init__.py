"""What of another project works here: mmdet's and mmseg's configs, each built in a process of its own."""
