"""What is told of a model, as plain values: written down once, near the ground, and without torch."""
