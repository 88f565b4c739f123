"""`quartet demo`: a synthetic market through a real server and a real worker, shown while it happens."""
