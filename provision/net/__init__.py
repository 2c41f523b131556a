"""Downloads over HTTP: sessions, response bodies, retries, and one file from several sources.

Knowledge about hubs, indexes and channels does not belong here.
"""
