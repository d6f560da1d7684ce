"""The demo: a generated scene, a real brain volume, and the bundles trained for them."""
