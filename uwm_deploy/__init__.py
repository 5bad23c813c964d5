"""Makes a CLIP-like model safer without training, compiles it, and proves that what ships is the edited model."""

__version__ = "0.1.0"
