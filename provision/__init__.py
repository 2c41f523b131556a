"""Prepares a host for diffusion work: reads its facts, plans the steps, and applies those that have work to do."""
