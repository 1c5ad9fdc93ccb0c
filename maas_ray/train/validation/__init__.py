"""Trained models after or beside training: loading, asynchronous validation, Hugging Face export."""
