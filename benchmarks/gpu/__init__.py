"""What is measured on a GPU whenever one is at hand: see README.md beside this."""
