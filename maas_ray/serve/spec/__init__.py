"""Specs of pools: fields, defaults and validation."""
