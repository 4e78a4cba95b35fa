"""Containers of named tensors: headers first, then any range of rows. Nothing here knows of adapters or models."""
