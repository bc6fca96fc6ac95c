"""Moves that keep the posterior exactly, and how they are run."""
