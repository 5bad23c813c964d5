"""What a person reads on standard output, one module per subject; some of it in Markdown and CSV, too."""
