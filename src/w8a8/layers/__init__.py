"""One quantised layer: what it holds, what it computes, what it tells."""
