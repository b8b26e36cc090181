"""Training pictures, volumes and colours from glTF assets, without Blender."""
