"""What the notebooks share: drawing, a real model's weights, and what one of them would be too long with."""
