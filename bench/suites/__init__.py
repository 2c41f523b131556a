"""The suites that are shipped, as data; `pytest --pyargs bench.suites` runs one with pytest-benchmark."""
