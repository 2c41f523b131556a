"""Holds the parts that every other package uses.

They are errors, child processes, redaction of secrets, the layout of the root, steps and hashes. Hosts, mirrors and
models do not belong here.
"""
