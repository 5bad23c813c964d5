"""Stage `edit`: the patch and the edited model."""
