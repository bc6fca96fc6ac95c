"""Paths and vectors as Gaussian sites see them: a change of variables for joint sampling."""
