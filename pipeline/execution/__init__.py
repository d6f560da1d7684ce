"""Running tiles: the queue, a worker, the serial oracle, and a pool of Ray actors."""
