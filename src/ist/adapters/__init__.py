"""What a layer is, and what its adapters add to it."""
