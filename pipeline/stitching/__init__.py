"""From tiles to one mask: keep the core, and scores when asked for."""
