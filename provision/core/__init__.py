"""What every package stands on.

Errors, child processes, secrets, the layout of the root, steps, hashes. It knows of no host, mirror or model.
"""
