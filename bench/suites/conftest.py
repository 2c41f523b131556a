"""Lets `pytest --pyargs bench.suites` find the plugin where firstlight is not installed as a package."""

pytest_plugins = ["bench.pytest_plugin"]
