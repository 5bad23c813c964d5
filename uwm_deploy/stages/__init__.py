"""One module per stage of the pipeline; stages meet in records and never import each other."""
