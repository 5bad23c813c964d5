"""What comes out behind an edited tower: captions of a language model, pictures of a diffusion model."""
