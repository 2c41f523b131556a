"""Files and folders through open directory descriptors.

Read, copied, compared, merged. What they hold is not known here.
"""
