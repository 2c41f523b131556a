"""Provide the shipped suites as TOML files; `pytest --pyargs bench.suites` runs one with pytest-benchmark."""
