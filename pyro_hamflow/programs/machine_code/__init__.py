"""Machine code: the compiler that makes it, and where it is kept."""
