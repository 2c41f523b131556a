"""Measure cases under the measured interpreter, with its torch and diffusers and without the packages of firstlight."""
