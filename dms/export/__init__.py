"""`dms export`: a retrofitted model as others use it, with the code beside the weights or without."""
