"""Learned energies for all data sets of a model."""
