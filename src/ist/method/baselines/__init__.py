"""Ways to choose that the paper compares with: LISA, LIFT, a fixed set, every layer."""
