"""Initialisers of LoRA that look at the base: pure functions of a weight."""
