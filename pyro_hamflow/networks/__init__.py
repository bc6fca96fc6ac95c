"""Small networks with closed-form gradients, and how they are trained."""
