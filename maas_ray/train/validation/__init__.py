"""Trained models during and after training: loading, asynchronous validation, Hugging Face export."""
