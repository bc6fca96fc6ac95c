"""What the user takes away."""
