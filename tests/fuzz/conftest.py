"""Takes the fixtures of the tests of provision."""

from tests.provision.conftest import envs, serve, wheels

__all__ = ["envs", "serve", "wheels"]
