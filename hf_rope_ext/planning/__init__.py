"""The length of a request, and what a longer context takes."""
