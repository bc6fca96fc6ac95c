"""Likelihood estimates with explicit noise: local latent variables integrated out."""
