"""Examine a device for `bench validate`, in a worker process under the measured interpreter."""
