"""What models are made of: the catalog, and files seen in its light."""
