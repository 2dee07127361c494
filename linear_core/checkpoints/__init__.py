"""From files to a model and back: reading what may be damaged or hostile, naming what was published, converting."""
