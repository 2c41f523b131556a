"""Show runs and validations as text, Markdown, HTML and charts, and export them for other programs."""
