"""Other systems of the field, which are trained: their losses, a trainer, and what makes a checkpoint of the result."""
