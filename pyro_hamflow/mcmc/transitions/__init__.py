"""Moves that leave a target exactly invariant: one file for each."""
