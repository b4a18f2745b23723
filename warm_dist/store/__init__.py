"""Objects on S3 or in a folder behind one interface, a local cache, and the embedded S3 server."""
