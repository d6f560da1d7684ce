"""From labelled images to weights."""
