"""From pixels to logits."""
