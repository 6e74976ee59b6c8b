"""How long a request is and what a longer context takes."""
