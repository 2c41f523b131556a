"""Register the plugin for `pytest --pyargs bench.suites` where firstlight is not installed as a package."""

pytest_plugins = ["bench.pytest_plugin"]
