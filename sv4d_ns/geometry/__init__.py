"""Cameras and the geometry of the world; knows no picture."""
