"""What users name: a model joined to transitions and a warm-up."""
