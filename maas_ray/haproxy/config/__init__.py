"""The configuration of HAProxy: text in, text out."""
