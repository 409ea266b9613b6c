"""Fusing: what lies between the integer layers of a model in as few passes as it takes, found by what it computes."""
