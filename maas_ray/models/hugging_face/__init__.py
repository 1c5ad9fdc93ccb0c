"""Models and weight folders in Hugging Face's format."""
