"""The commands: options in, one call, one view out. No maths, and no files of their own."""
