"""Show runs and validations as text, Markdown, HTML, charts, and files for other programs."""
