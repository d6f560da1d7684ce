"""Pure numerics and execution: domain, models, inference, CRF, stitching, training, execution."""
