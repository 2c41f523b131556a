"""Makes a host ready for diffusion work: facts, plan, steps."""
