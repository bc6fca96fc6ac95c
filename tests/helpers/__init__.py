"""What several tests share: laws, targets, models, and the exact draws of them."""
