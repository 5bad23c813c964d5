"""The drawn world, the script that trains a small CLIP on it, and the model that ships."""
