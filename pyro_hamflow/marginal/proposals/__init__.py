"""Where the particles of a likelihood estimate come from: one file for each way."""
