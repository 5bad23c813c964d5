"""What is shipped: its layout, opened and checked, written, signed, and described for other tools."""
