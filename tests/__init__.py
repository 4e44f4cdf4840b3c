"""A folder for each question: CONTRIBUTING.md says which."""
