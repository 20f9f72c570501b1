"""Reads rows from files of every format, saved datasets, the hub and other packages' sources, one by one."""
