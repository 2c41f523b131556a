"""What `bench validate` asks of a device, under the measured interpreter."""
