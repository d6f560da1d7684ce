"""Networks and the bundles that hold them."""
