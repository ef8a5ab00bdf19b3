"""Ways to choose that draw sets of layers: the paper's learned importance, and uniform."""
