"""Provide the shipped suites as data; `pytest --pyargs bench.suites` runs one with pytest-benchmark."""
