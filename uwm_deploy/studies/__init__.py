"""What runs the pipeline many times, or looks at what it made."""
