"""One module a format or outside system; none knows another, ``uri`` stands above them."""
