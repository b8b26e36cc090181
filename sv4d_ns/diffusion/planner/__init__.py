"""What a run of the diffusion model needs in memory and time (`sv4d plan`)."""
