"""Machine code that makes many draws in one call."""
