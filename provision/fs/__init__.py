"""Reads, copies, compares and merges files and folders through open directory descriptors.

Knowledge about the content of the files does not belong here.
"""
