"""Models: built-in families by name, and any nn.Module by import path."""
