"""TOML files to records: recipes, data sets and policies, and where they are found."""
