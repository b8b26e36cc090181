"""Score distillation of a space-time field (4Diffusion): the objective and its parts, in plain torch."""
