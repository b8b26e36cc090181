"""From a video to a grid of views, by any model."""
