"""Tools that look at the layer: explain and compare, and the tour of a small real model."""
