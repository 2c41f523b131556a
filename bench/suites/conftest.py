"""Register the plugin for `pytest --pyargs bench.suites` from a checkout, where firstlight is not installed."""

pytest_plugins = ["bench.pytest_plugin"]
