"""What turns a model into a picture over time: drawing tokens, ending lines, splitting batches that do not fit."""
