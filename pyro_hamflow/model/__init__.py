"""A Pyro model as the density of one flat vector."""
