"""What warm-up learns: step size, mass, surrogate."""
