"""`quartet feed`: an exchange's closed bars onto the stream, history first, none missing, none twice."""
