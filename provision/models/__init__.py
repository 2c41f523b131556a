"""Models in the Hugging Face cache: pulled, verified, listed, removed, and what stands in for them."""
