"""HTTP: sessions, bodies, retries, and one file from several sources. It knows nothing of hubs or indexes."""
