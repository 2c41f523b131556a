"""Measure cases under the measured interpreter; this needs torch and diffusers, and none of firstlight's packages."""
