"""The arithmetic: what is asked (scheme) and the equation, on tensors; no module, no file."""
