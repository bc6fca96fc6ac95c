"""Learned maps that follow Hamiltonian motion, and the guides built on them."""
