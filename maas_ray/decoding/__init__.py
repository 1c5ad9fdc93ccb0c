"""Decoding of encoded images and of texts: the same functions in training and in replicas. Independent of torch and Ray."""
