"""Hamiltonian motion, shared by samplers and flows."""
