"""Everything that runs under the measured interpreter: it needs torch and diffusers, and nothing of the toolbox."""
