"""What connects the package with other libraries; each module imports its library, and nothing imports them."""
