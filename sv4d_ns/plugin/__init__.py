"""What nerfstudio is given and told: the only room that knows how its commands speak."""
