"""Adapter checkpoints: every reader returns the same `Adapters`, in which all names are those of the base's files."""
