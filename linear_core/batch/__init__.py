"""A picture for every row of a file: read (table), drawn on one machine (draw) or on many (over_ray), kept (folder)."""
