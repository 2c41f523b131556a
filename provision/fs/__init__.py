"""Reads, copies, compares and merges files and folders through open directory descriptors.

Code that depends on the meaning of the files' contents does not belong here.
"""
