"""Downloads over HTTP: sessions, response bodies, retries, and one file from several sources.

Code that knows the layout of a hub, a package index or a conda channel does not belong here.
"""
