"""Weighted populations of draws."""
