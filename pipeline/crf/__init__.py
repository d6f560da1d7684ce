"""Dense CRF: parameters with units, and mean field over a tile through pydensecrf."""
