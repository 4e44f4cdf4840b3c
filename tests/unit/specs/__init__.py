"""What `conf/` says of models and machines: bytes, kernel times, link times."""
